"""Builds fastpeft._C from csrc/ where a C++ compiler is found; without one the package installs, and info() says so."""

import os
import shutil
import sys
from pathlib import Path

from setuptools import setup

SOURCES = sorted(str(path) for path in Path("csrc").glob("*.cpp"))
# The stable ABI of libtorch 2.10: one build serves every later torch.
FLAGS = ["-O3", "-std=c++17", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Werror",
         "-DTORCH_TARGET_VERSION=0x020a000000000000"]  # fmt: skip


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or shutil.which("clang++")


def extensions() -> tuple[list, dict]:
    if os.environ.get("FASTPEFT_CPP", "auto") == "0":
        return [], {}
    if compiler() is None:
        if os.environ.get("FASTPEFT_CPP") == "1":
            sys.exit("fastpeft: FASTPEFT_CPP must be 0 or auto where no C++ compiler is found, got 1")
        print("fastpeft: no C++ compiler found; installing without the CPU kernels", file=sys.stderr)
        return [], {}
    import pybind11
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    extension = CppExtension(
        "fastpeft._C",
        SOURCES,
        include_dirs=[pybind11.get_include()],
        extra_compile_args={"cxx": FLAGS},
        extra_link_args=["-Wl,--no-as-needed"],
        libraries=["torch", "torch_cpu", "c10"],
        depends=sorted(str(path) for path in Path("csrc").glob("*.h")),
    )
    return [extension], {"build_ext": BuildExtension.with_options(use_ninja=True)}


ext_modules, cmdclass = extensions()
setup(ext_modules=ext_modules, cmdclass=cmdclass)
