"""What a new operator is added to, in order; ``left_out`` names each step that was forgotten.

1. fastpeft/dispatch.py: a line of ROWS, with the backends that there are
2. fastpeft/reference/<file>.py: the launcher in plain torch
3. fastpeft/ops/<file>.py: the fake, `describe` (`flops` for a backward), `_library.register`, and the public function,
   which ops/__init__ exports
4. kernels/<file>.py, where the row names Triton; bench/compile/kernels.CASES compiles its kernels, tune/tiles.JOBS (or
   tune/fourbit.TILES) times each mode of its tiles, and a check of bench/checks launches it
5. csrc/library.cpp, csrc/cpu/<op>.cpp and fastpeft/_native.py, where the row names C++; or the module that it names,
   where Python calls the vendor and C++
6. tests/ops/test_<file>.py; an example in tests/ops/test_info.py for a public function
"""

import importlib
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch

from fastpeft import dispatch, ops
from fastpeft.ops import _flops, _library

# A launcher inside another operator, which explain shows for both.
INSIDE = {"quantize_absmax": "quantize_4bit"}
# Tiles that are not timed, and why.
UNTIMED = {
    ("quantize_4bit", "plain"): "runs once a weight, not once a step",
    (
        "lora_shrink",
        "copy",
    ): "the shrink of a dequantised product; its tiles differ from the plain ones in registers alone",
    ("lora_shrink", "copy_dropout"): "likewise",
}


@dataclass(frozen=True)
class House:
    """root: of the sources · compiled: bench/compile/kernels.CASES · timed: (file, mode) of the tuner's jobs ·
    checked: what the checks of a GPU launch, by name of the launcher."""

    root: Path
    compiled: Collection[str]
    timed: Collection[tuple[str, str]]
    checked: Collection[str]


def registered() -> set[str]:
    """The raw operators of this process."""
    names = torch._C._dispatch_get_all_op_names()
    return {name.removeprefix("fastpeft::") for name in names if name.startswith("fastpeft::")}


def plain(schema: str) -> str:
    """A schema without what differs between Python and C++: the backend, symbolic sizes, letters of aliases, the name."""
    schema = schema.replace(", str backend", "").replace("SymInt", "int")
    return re.sub(r"^[^(]*", "", re.sub(r"\([a-z]\d*(?: -> )?!\)", "(!)", schema))


def native_schemas(root: Path) -> dict[str, str]:
    """What csrc/library.cpp defines."""
    file = root / "csrc" / "library.cpp"
    text = re.sub(r'"\s*\n\s*"', "", file.read_text()) if file.exists() else ""
    return {text.split("(")[0]: text for text in re.findall(r'm\.def\(\s*"([^"]*)"\)', text)}


def _python(op: str, row: dispatch.Row, house: House) -> list[str]:
    out = []
    for folder in ("fastpeft/reference", "fastpeft/ops", "tests/ops/test_"):
        path = f"{folder}{row.file}.py" if folder.endswith("_") else f"{folder}/{row.file}.py"
        if not (house.root / path).exists():
            out.append(f"{path}: no such file")
    if not out and not hasattr(importlib.import_module(f"fastpeft.reference.{row.file}"), op):
        out.append(f"fastpeft/reference/{row.file}.py: no {op}")
    registers = op in registered()
    if not registers:
        out.append(f"fastpeft/ops/{row.file}.py: {op} is not registered")
    exported = {getattr(ops, name).__module__ for name in ops.__all__}
    if f"fastpeft.ops.{row.file}" not in exported:
        out.append(f"fastpeft/ops/__init__.py: exports nothing of {row.file}")
    if registers and op not in _library._described and op not in INSIDE and not op.endswith("_bwd"):
        out.append(f"fastpeft/ops/{row.file}.py: no describe for {op}, which explain does not show")
    elif registers and op not in _flops.FORMULAS:
        out.append(f"fastpeft/ops/{row.file}.py: no flops for {op}, which FlopCounterMode does not count")
    return out


def _triton(op: str, row: dispatch.Row, house: House) -> list[str]:
    path = house.root / "kernels" / f"{row.file}.py"
    if not path.exists():
        return [f"kernels/{row.file}.py: no such file"]
    module, out = importlib.import_module(f"fastpeft.kernels.{row.file}"), []
    if not hasattr(module, op):
        out.append(f"kernels/{row.file}.py: no {op}")
    if op not in house.checked:
        out.append(f"bench/checks: no check launches {op}")
    if re.search(r"^@triton\.jit\ndef _\w+_kernel\(", path.read_text(), re.MULTILINE):
        if row.file not in house.compiled:
            out.append(f"bench/compile/kernels.py: no case compiles {row.file}")
        modes = {(row.file, mode) for mode in module.MODES} - UNTIMED.keys() - set(house.timed)
        out += [f"bench/tune/tiles.py: no job times mode {mode!r} of {file}" for file, mode in sorted(modes)]
    return out


def _cpp(op: str, house: House) -> list[str]:
    native, out = native_schemas(house.root).get(op), []
    if native is None:
        out.append(f"csrc/library.cpp: no schema of {op}")
    elif op in registered():
        ours = str(getattr(torch.ops.fastpeft, op).default._schema)
        if plain(str(torch._C.parse_schema(native))) != plain(ours):
            out.append(f"csrc/library.cpp: the schema of {op} differs from {ours}")
    sources = [path.read_text() for path in (house.root / "csrc").glob("**/*.cpp")]
    if not any(f'm.impl("{op}"' in text for text in sources):
        out.append(f"csrc: nothing implements {op}")
    names = house.root / "fastpeft" / "_native.py"
    if not names.exists() or not re.search(rf"^ *{op} = _ops\.{op}\.default\._op$", names.read_text(), re.MULTILINE):
        out.append(f"fastpeft/_native.py: no {op}")
    return out


def left_out(op: str, house: House) -> list[str]:
    """The steps that are missing for a launcher, each by the place where it belongs."""
    row = dispatch.ROWS.get(op)
    if row is None:
        return [f"fastpeft/dispatch.py: ROWS has no line for {op}"]
    out = _python(op, row, house)
    if row.get("triton"):
        out += _triton(op, row, house)
    if (cpp := row.get("cpp")) is dispatch.CPP:
        out += _cpp(op, house)
    elif cpp and not hasattr(importlib.import_module(cpp.module), op):
        out.append(f"{cpp.module}: no {op}")
    return out
