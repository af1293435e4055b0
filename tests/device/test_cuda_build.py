"""The build with CUDA: what setup.py asks for, one door to PTX and launches, and a clear error without nvcc."""

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
DOOR = CSRC / "cuda" / "fp_cuda.h"
NVCC = shutil.which("nvcc")


def run_setup(*arguments, **variables):
    environment = {**os.environ, **variables}
    command = [sys.executable, "setup.py", "--quiet", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)


def without_nvcc(tmp_path):
    """A PATH that has a C++ compiler and no nvcc."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    (tmp_path / "c++").symlink_to(compiler)
    return {"PATH": str(tmp_path), "CUDA_HOME": str(tmp_path)}


def test_cuda_asked_for_and_not_there(tmp_path):
    done = run_setup("--version", **without_nvcc(tmp_path), FASTPEFT_CUDA="1")
    assert done.returncode != 0
    assert "FASTPEFT_CUDA must be 0 or auto where no nvcc is found, got 1" in done.stderr


@pytest.mark.parametrize("wanted", ["auto", "0"])
def test_cuda_left_out(tmp_path, wanted):
    assert run_setup("--version", **without_nvcc(tmp_path), FASTPEFT_CUDA=wanted).returncode == 0


def test_switch_has_three_values():
    done = run_setup("--version", FASTPEFT_CUDA="yes")
    assert done.returncode != 0 and "FASTPEFT_CUDA must be 0, 1 or auto, got 'yes'" in done.stderr


def test_setup_fits_in_one_head():
    assert len((ROOT / "setup.py").read_text().splitlines()) <= 100


def test_build_info_names_the_architectures():
    native = pytest.importorskip("fastpeft._native", reason="the extension is not built")
    assert re.fullmatch(r"none|\d+\.\d+a?(\+PTX)?(;\d+\.\d+a?(\+PTX)?)*", native.build_info()["cuda"])


def kernel_files():
    return [path for end in ("cu", "cuh") for path in sorted(CSRC.rglob(f"*.{end}"))]


@pytest.mark.parametrize("path", kernel_files(), ids=lambda path: path.name)
def test_one_door(path):
    """PTX, launches and CUDA's headers only through fp_cuda.h: anything else the emulator could not run."""
    text = path.read_text()
    for forbidden in (r"\basm\b", "<<<", r"#include <cuda", "cooperative_groups", r"__shared__", "__activemask"):
        assert not re.search(forbidden, text), f"{path.name} has {forbidden}"


def test_a_twin_of_every_wrapper():
    """Each name that fp_cuda.h gives nvcc, the emulator gives the host compiler."""
    door, twin = DOOR.read_text(), (ROOT / "tests/emulator/cuda_emu.h").read_text()
    names = set(re.findall(r"__forceinline__ \w+ (\w+)\(", door)) | set(re.findall(r"#define (FP_\w+)", door))
    assert len(names) >= 10
    for name in names:
        assert re.search(rf"\b{name}\b", twin), name


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
@pytest.mark.parametrize("path", sorted(CSRC.rglob("*.cu")), ids=lambda path: path.name)
def test_compiles_without_a_warning(path, tmp_path):
    command = [NVCC, "-c", "-O1", "-std=c++17", "-Werror", "all-warnings", "-arch=sm_80", "-I", CSRC, path]
    done = subprocess.run([*command, "-o", tmp_path / "o"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("given", "known", "taken"),
    [
        (None, "75 80 86 89 90 100 120", "8.0;8.6;8.9;9.0a;10.0;12.0+PTX"),
        (None, "75 80 86 87 89 90", "8.0;8.6;8.9;9.0+PTX"),  # CUDA 12.0 to 12.7
        (None, "35 50 70", ""),
        ("7.0 7.5 8.0 9.0+PTX", "", "8.0;9.0+PTX"),
        ("7.5", "", ""),
        ("Hopper", "", "Hopper"),
    ],
)
def test_architectures(monkeypatch, tmp_path, given, known, taken):
    """What nvcc does not know, or has no bf16, would cost the whole extension."""
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    if given:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", given)
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\n" + "".join(f"echo compute_{number}\n" for number in known.split()))
    nvcc.chmod(0o755)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    monkeypatch.setenv("FASTPEFT_CPP", "0")
    assert runpy.run_path("setup.py")["cuda_archs"](tmp_path) == taken
