"""The rooms of csrc/: who includes whom, and what is compiled once for each instruction set (csrc/README.md)."""

import re
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
CONTRACT = {"simd/kernels.h", "simd/fourbit_kernels.h"}
# room -> the rooms and files that it may include, its own files apart
ALLOWED = {
    "": {"host", "simd/dispatch.h", *CONTRACT},
    "cpu": {"host", "shared", *CONTRACT},
    "cuda": {"host", "shared"},
    "host": {"shared", *CONTRACT},
    "simd": {"shared"},
    "simd/lora": {"simd", "shared"},
    "simd/fourbit": {"simd", "shared"},
    "shared": set(),
}
DOORS = {"simd/table.h": {"simd/lora", "simd/fourbit"}}
FOR_EVERY_ISA = {"cstdint", "cstring", "immintrin.h"}
FILES = sorted(path for path in CSRC.rglob("*") if path.suffix in {".h", ".cuh", ".cpp", ".cu"})


def name(path):
    return path.relative_to(CSRC).as_posix()


def room(file):
    return file.rpartition("/")[0]


def ours(path):
    return re.findall(r'^#include "([^"]+)"', path.read_text(), re.MULTILINE)


@pytest.mark.parametrize("path", FILES, ids=name)
def test_includes_point_down(path):
    here = room(name(path))
    assert here in ALLOWED, f"{here}: no such room in csrc/README.md"
    allowed = ALLOWED[here] | DOORS.get(name(path), set())
    for target in ours(path):
        assert target in allowed or (CSRC / target).exists(), f"{target}: an include names its room"
        assert room(target) == here or {target, room(target)} & allowed, f"{name(path)} includes {target}"


def test_no_circle():
    """Each header can be put below all that include it."""
    left = {name(path): {target for target in ours(path) if (CSRC / target).exists()} for path in FILES}
    while left:
        free = {file for file, targets in left.items() if not targets & left.keys()}
        assert free, f"a circle among {sorted(left)}"
        left = {file: targets for file, targets in left.items() if file not in free}


@pytest.mark.parametrize("path", [path for path in FILES if name(path).startswith("simd/")], ids=name)
def test_nothing_for_every_isa_can_be_shared(path):
    """What is compiled for one instruction set stays in its object file."""
    if path.suffix != ".h" or name(path) in CONTRACT | {"simd/dispatch.h", "simd/isa.h"}:
        return
    text = path.read_text()
    twin = {"amx_emu.h"} if name(path) == "simd/amx.h" else set()
    assert set(re.findall(r"^#include <([^>]+)>", text, re.MULTILINE)) <= FOR_EVERY_ISA | twin
    assert re.search(r"^namespace \{$", text, re.MULTILINE) and "namespace fastpeft {" not in text


def test_every_instruction_set_is_in_the_table():
    table = (CSRC / "simd/dispatch.cpp").read_text()
    names = {re.search(r"#define FP_NAME (\w+)", path.read_text())[1]: path for path in CSRC.glob("simd/isa_*.cpp")}
    assert set(names) == set(re.findall(r'^ {4}\{"(\w+)", kernels_\1,', table, re.MULTILINE))
    assert all(path.name == f"isa_{isa}.cpp" for isa, path in names.items())


def test_every_operator_has_its_file():
    """cpu/<op>.cpp (its forward and backward together) and cuda/<op>.cu, but for what another operator's file holds."""
    inside = {"lora_expand_add": "lora_expand", "quantize_absmax": "quantize_4bit"}
    for path in CSRC.glob("cpu/*.cpp"):
        for op in re.findall(r'm\.impl\("(\w+)"', path.read_text()):
            assert path.stem == inside.get(op, re.sub("_(fwd|bwd)$", "", op)), op
    operators = re.findall(r'm\.impl\("(\w+)"', (CSRC / "cuda/operators.cpp").read_text())
    assert {path.stem for path in CSRC.glob("cuda/*.cu")} == set(operators)
