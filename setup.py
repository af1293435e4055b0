"""Builds fastpeft._C from csrc/: with a C++ compiler the CPU kernels, with nvcc the CUDA kernels too.

FASTPEFT_CPP and FASTPEFT_CUDA: 0 leaves a part out, 1 fails if it cannot be built, auto (default) builds what it can
and says what it cannot, and why. FASTPEFT_WERROR=1 turns warnings into errors. Compiling CUDA kernels needs neither a
GPU nor a CUDA build of torch; TORCH_CUDA_ARCH_LIST overrides CUDA_ARCHS."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

sys.path.insert(0, str(Path(__file__).resolve().parent))
from setup_commands import commands, cpp_lack, leave_out, wanted

SOURCES, CUDA_SOURCES = (sorted(map(str, Path("csrc").rglob(end))) for end in ("*.cpp", "*.cu"))
INCLUDE = str(Path("csrc").resolve())
STRICT = os.environ.get("FASTPEFT_WERROR") == "1"
DEBUG = (
    "-g" in os.environ.get("CFLAGS", "").split()
)  # else none: Python's own -g makes the extension ten times as large
# The stable ABI of libtorch 2.10: one build serves every later torch.
FLAGS = ["-O3", "-std=c++17", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter",
         "-DTORCH_TARGET_VERSION=0x020a000000000000", *(["-g0"] * (not DEBUG)), *(["-Werror"] * STRICT)]  # fmt: skip
NVCC_FLAGS = ["-O3", "-std=c++17", "-Xcompiler", "-fvisibility=hidden", *(["-Werror", "all-warnings"] * STRICT)]
CUDA_ARCHS = "8.0;8.6;8.9;9.0a;10.0;12.0+PTX"


def cuda_home() -> Path | None:
    """The toolkit's folder, asked of nvcc itself: the nvcc on PATH may be a wrapper."""
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")
    if nvcc is None:
        return None
    said = subprocess.run([nvcc, "--dryrun", "-E", "any.cu"], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.+)$", said, re.MULTILINE)
    return Path(top[1]).resolve() if top and (Path(top[1]) / "include/cuda_runtime.h").exists() else None


def cuda_archs(home: Path) -> str:
    """The requested architectures that have bf16 (torch's images request older ones), or those of ours nvcc knows."""
    if given := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return ";".join(arch for arch in re.findall(r"[^;\s]+", given) if not re.match(r"[1-7]\.", arch))
    known = subprocess.run([home / "bin/nvcc", "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
    archs = [arch for arch in CUDA_ARCHS.split(";") if "compute_" + re.sub(r"\D", "", arch) in known]
    return ";".join(archs).removesuffix("+PTX").removesuffix("a") + "+PTX" if archs else ""  # for GPUs to come


def cuda_options() -> dict | None:
    """What CppExtension needs for the .cu files; None if they are not built."""
    home = cuda_home() if wanted("FASTPEFT_CUDA") != "0" else None
    archs = cuda_archs(home) if home else ""
    if not archs:
        leave_out("CUDA kernels", "no architecture from 8.0 on is to be had" if home else "no nvcc is found")
        return None
    from torch.utils import cpp_extension

    cpp_extension.CUDA_HOME = str(home)  # a CPU build of torch leaves it unset
    # The .cu files include no torch header and link the CUDA runtime statically, so torch's CUDA version may differ.
    cpp_extension._check_cuda_version = lambda *_: None
    os.environ["TORCH_CUDA_ARCH_LIST"] = archs
    return {"home": home, "define": f'-DFASTPEFT_CUDA="{archs}"'}


def options() -> dict:
    if lack := cpp_lack():
        for part in ("C++ kernels", "CUDA kernels"):
            leave_out(part, lack)
        return commands([])
    try:
        import pybind11
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:  # for example while an sdist is built in an isolated environment
        return commands([], lack=f"{error.name} is not installed where it is built")

    def extension(cuda: dict | None) -> CppExtension:
        return CppExtension(
            "fastpeft._C",
            SOURCES + (CUDA_SOURCES if cuda else []),
            include_dirs=[INCLUDE, pybind11.get_include()] + ([str(cuda["home"] / "include")] if cuda else []),
            extra_compile_args={"cxx": FLAGS + ([cuda["define"]] if cuda else []), "nvcc": NVCC_FLAGS},
            # libtorch.so pulls in libtorch_cuda.so if torch has it: keep it although none of its symbols is used.
            extra_link_args=["-Wl,--no-as-needed,-ltorch"] if sys.platform == "linux" else [],
            library_dirs=[str(cuda["home"] / "lib64")] if cuda else [],
            libraries=["torch_cpu", "c10"] + (["cudart_static", "rt", "dl", "pthread"] if cuda else []),
            depends=sorted(str(path) for path in Path("csrc").rglob("*.*h")),
        )

    cuda = cuda_options()
    return commands([extension(cuda), extension(None)] if cuda else [extension(None)], BuildExtension)


setup(**options())
