"""The order of the rooms of bench/: a file imports only from rooms below its own, and no two files import each other."""

import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "bench"
# room -> the rooms below it; "" are the commands of the folder itself
BELOW = {
    "common": set(),
    "peers": {"common"},
    "compile": {"common"},
    "tune": {"common", "compile"},
    "experiments": {"common"},
    "checks": {"common"},
    "gpu": {"common", "peers", "compile", "tune", "checks", "experiments"},
    "": {"common", "peers", "compile", "tune", "checks", "experiments", "gpu"},
}
FILES = sorted(path for path in BENCH.rglob("*.py"))


def room(path: Path) -> str:
    return path.parent.relative_to(BENCH).as_posix().split("/")[0].removeprefix(".")


def imported(path: Path) -> set[str]:
    """Modules of bench/ that a file imports, at its top or within a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import hides its room"
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    commands = {path.stem for path in FILES if not room(path)}
    return {name for name in found if name.split(".")[0] in BELOW.keys() | commands}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(BENCH).as_posix())
def test_imports_point_down(path):
    assert room(path) in BELOW, f"{path}: no such room"
    for name in imported(path):
        assert name.split(".")[0] in BELOW[room(path)] | {room(path)}, f"{path} imports {name}"
    assert not re.search(r"sys\.path\.|sys\.path\[", path.read_text()), f"{path} edits sys.path"


def test_no_circles():
    modules = {".".join(path.relative_to(BENCH).with_suffix("").parts): path for path in FILES}
    edges = {name: imported(path) & modules.keys() for name, path in modules.items()}
    while leaves := [name for name, below in edges.items() if not below & edges.keys()]:
        for name in leaves:
            del edges[name]
    assert not edges, f"these import each other: {sorted(edges)}"


def test_words_are_the_makefile_s():
    """Every word of ``python bench`` names a module with a main, and every word that the Makefile calls is one."""
    spec = importlib.util.spec_from_file_location("bench_main", BENCH / "__main__.py")
    words = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(words)
    called = set(re.findall(r"(?:python|PYTHON\)) bench (\w+)", (ROOT / "Makefile").read_text()))
    assert called <= words.WORDS.keys()
    assert words.main(["no such word"]) == 2
    for module in words.WORDS.values():
        assert callable(importlib.import_module(module).main)
