"""The order of the layers and the same-name rule: a file imports only from lines below its own (README, "Layout")."""

import ast
from pathlib import Path

import pytest

from fastpeft import dispatch

ROOT = Path(__file__).parents[2]

# prefix of a module -> the modules of the package that it may import, itself and its own folder apart
ALLOWED = {
    "fastpeft.testing": {"fastpeft.reference", "fastpeft.dispatch"},
    "fastpeft.integrations": {"fastpeft.nn", "fastpeft.ops"},
    "fastpeft.models": {"fastpeft.manager", "fastpeft.nn", "fastpeft.ops"},
    "fastpeft.manager": {"fastpeft.files", "fastpeft.nn", "fastpeft.ops", "fastpeft.integrations"},
    "fastpeft.files": {"fastpeft.nn", "fastpeft.ops"},
    "fastpeft.nn": {"fastpeft.ops", "fastpeft.dispatch"},
    "fastpeft.ops": {"fastpeft.dispatch", "fastpeft.reference._masks"},
    "fastpeft.dispatch": set(),
    "fastpeft.reference": set(),
    "fastpeft.kernels": set(),
    "fastpeft._installed": set(),
    "fastpeft._extension": {"fastpeft._C", "fastpeft._installed", "fastpeft._version"},
    "fastpeft._native": {"fastpeft._extension"},
    "fastpeft._native_conv": {"fastpeft._native"},
    "fastpeft._cuda_gpus": {"fastpeft._extension", "fastpeft._installed"},
    "fastpeft._cuda": {"fastpeft._cuda_gpus", "fastpeft.kernels"},
    "fastpeft._version": set(),
    "fastpeft._warmup": {"fastpeft.dispatch", "fastpeft.integrations", "fastpeft.nn", "fastpeft.ops"},
    "fastpeft._info": {"fastpeft._installed", "fastpeft.dispatch", "fastpeft.ops", "fastpeft._version"},
    "fastpeft.cli": {
        "fastpeft",
        "fastpeft.integrations",
        "fastpeft.manager",
        "fastpeft.models",
        "fastpeft.nn",
        "fastpeft.ops",
    },
    "fastpeft.__main__": {"fastpeft.cli"},
    "fastpeft": {
        "fastpeft.manager",
        "fastpeft.integrations",
        "fastpeft.models",
        "fastpeft.nn",
        "fastpeft.ops",
        "fastpeft._info",
        "fastpeft._installed",
        "fastpeft._version",
        "fastpeft._warmup",
    },
}
OUTSIDE = {"fastpeft.kernels": {"torch", "triton", "__future__"}, "fastpeft.reference": {"torch", "__future__"}}
STDLIB_FOR_KERNELS = {"contextlib", "dataclasses", "functools", "math", "threading", "types", "collections", "typing", "importlib", "itertools", "json", "os", "pathlib", "struct", "sys"}  # fmt: skip


def modules():
    for folder, package in (("fastpeft", "fastpeft"), ("kernels", "fastpeft.kernels")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = [package, *path.relative_to(ROOT / folder).with_suffix("").parts]
            yield path, ".".join(part for part in parts if part != "__init__")


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import hides its layer"
            if node.module == "fastpeft" or node.module in {"fastpeft.ops", "fastpeft.nn", "fastpeft.kernels"}:
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
            else:
                yield node.module


def layer(name):
    return max((prefix for prefix in ALLOWED if name == prefix or name.startswith(prefix + ".")), key=len, default=None)


@pytest.mark.parametrize(("path", "name"), list(modules()), ids=lambda value: value if isinstance(value, str) else "")
def test_imports_point_down(path, name):
    own = layer(name)
    assert own is not None
    for target in imports(path):
        if target.split(".")[0] == "fastpeft":
            there = layer(target)
            assert there == own or there in ALLOWED[own] or target in ALLOWED[own], f"{name} imports {target}"
        elif own in OUTSIDE:
            allowed = OUTSIDE[own] | (STDLIB_FOR_KERNELS if own == "fastpeft.kernels" else set())
            assert target.split(".")[0] in allowed, f"{name} imports {target}"


def test_nothing_imports_the_top():
    for path, name in modules():
        for target in imports(path):
            assert target.split(".")[0] not in {"tests", "bench", "examples"}, f"{name} imports {target}"


def test_same_base_name_in_every_folder():
    for op, row in dispatch.ROWS.items():
        file = f"{row.file}.py"
        for folder in ("fastpeft/reference", "fastpeft/ops", "kernels"):
            assert (ROOT / folder / file).exists(), f"{op}: no {folder}/{file}"
        assert (ROOT / "tests" / "ops" / f"test_{file}").exists(), f"{op}: no tests/ops/test_{file}"


def test_files_are_one_room():
    for folder in ("fastpeft", "kernels", "csrc", "bench", "examples"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in {".py", ".cpp", ".h", ".cu", ".cuh"}:
                lines = len(path.read_text().splitlines())
                assert lines <= 300, f"{path.relative_to(ROOT)}: {lines} lines"
