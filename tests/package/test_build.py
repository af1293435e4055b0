"""The build that users run: what it leaves out and says, what it packs, and Python started in a checkout."""

import json
import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import setuptools
from torch.utils import cpp_extension

ROOT = Path(__file__).parents[2]
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")


def environment(**variables):
    ours = {"PYTHONPATH", "MAKEFLAGS", "MAKELEVEL", "PYTHON", "VENV", "TORCH"}
    return (
        {name: value for name, value in os.environ.items() if name not in ours}
        | {"FASTPEFT_CPP": "0", "FASTPEFT_CUDA": "auto", "PYTHONDONTWRITEBYTECODE": "1"}
        | variables
    )


def run(folder, *command, check=True, **variables):
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment(**variables))
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def tracked():
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    return run(ROOT, "git", "ls-files").stdout.split()


@pytest.fixture(scope="module")
def checkout(tracked, tmp_path_factory):
    """A fresh clone: the tracked files as they are now, nothing built."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in tracked:
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory):
    """Built without C++ where an earlier build has left a module that is no more, and an extension."""
    folder = tmp_path_factory.mktemp("wheel")
    platform = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    for name in (f"_C{SUFFIX}", "gone.py"):
        path = checkout / f"build/lib.{platform}/fastpeft" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    done = run(checkout, sys.executable, "setup.py", "-q", "bdist_wheel", "-d", str(folder))
    assert "fastpeft: built without the C++ kernels: FASTPEFT_CPP=0" in done.stderr
    (path,) = folder.iterdir()
    return path


def test_a_wheel_without_the_extension(wheel):
    """It is tagged as this platform's and Python's, below a whole one, and holds why."""
    python, abi, platform = wheel.stem.split("-")[-3:]
    assert python == f"cp{sys.version_info[0]}{sys.version_info[1]}" and abi == "none" and platform != "any"
    with zipfile.ZipFile(wheel) as packed:
        names = set(packed.namelist())
        assert json.loads(packed.read("fastpeft/_build.json"))["left_out"] == {
            "C++ kernels": "FASTPEFT_CPP=0",
            "CUDA kernels": "FASTPEFT_CPP is 0",
        }
    assert {"fastpeft/kernels.py", "fastpeft/kernels/lora_linear.py"} <= names
    assert not [name for name in names if "_C." in name or "gone" in name or name.startswith("kernels")]


def test_the_installed_package_and_the_checkout_say_so(wheel, checkout, tmp_path):
    """Python started in a checkout takes it before the installed package: its own kernels, nobody's extension, a warning."""
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = """
import sys, warnings
with warnings.catch_warnings(record=True) as caught:
    import fastpeft, fastpeft.kernels._strategy_table as kernels
print(fastpeft.__file__, kernels.__file__, fastpeft.info(), *(str(w.message) for w in caught), sep="\\n")
"""
    installed = run(tmp_path, sys.executable, "-c", code, PYTHONPATH=str(tmp_path)).stdout.splitlines()
    assert installed[:2] == [
        str(tmp_path / "fastpeft" / name) for name in ("__init__.py", "kernels/_strategy_table.py")
    ]
    assert any(
        "cpp" in line and "left out when this package was built, as FASTPEFT_CPP=0" in line for line in installed
    )
    assert "  extension without CUDA kernels: FASTPEFT_CPP is 0" in installed

    (tmp_path / "fastpeft" / f"_C{SUFFIX}").touch()
    here = run(checkout, sys.executable, "-c", code, PYTHONPATH=str(tmp_path)).stdout.splitlines()
    assert here[:2] == [str(checkout / name) for name in ("fastpeft/__init__.py", "kernels/_strategy_table.py")]
    assert any("cpp" in line and f"not built in the checkout {checkout}" in line for line in here)
    assert f"takes it before the package in {tmp_path / 'fastpeft'}" in here[-1]


def test_the_extension_of_another_checkout(tmp_path):
    """The finder of an editable installation offers it to every checkout."""
    code = f"""
import importlib.machinery, importlib.util, sys, torch, fastpeft
spec = importlib.machinery.ModuleSpec("fastpeft._C", None, origin={str(tmp_path / f"_C{SUFFIX}")!r})
importlib.util.find_spec = lambda name, package=None: spec
print(fastpeft.dispatch.unmet("lora_linear_fwd", "cpp", "cpu", torch.float32))
"""
    said = run(ROOT, sys.executable, "-c", code).stdout
    assert f"that in {tmp_path} is another checkout's" in said


def test_the_folder_kernels_is_no_package(checkout, tmp_path):
    """An installed one of that name is found before it."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").touch()
    code = "import kernels; print(kernels.__file__)"
    said = run(checkout, sys.executable, "-c", code, PYTHONPATH=str(tmp_path)).stdout.strip()
    assert said == str(tmp_path / "kernels" / "__init__.py")


def test_sources_are_whole(checkout, tracked, tmp_path):
    """The sdist has every tracked file, and nothing that was built."""
    (checkout / "fastpeft" / "_build.json").write_text("{}")
    run(checkout, sys.executable, "setup.py", "-q", "sdist", "-d", str(tmp_path))
    (path,) = tmp_path.iterdir()
    with tarfile.open(path) as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
    assert set(tracked) - {name for name in tracked if not (ROOT / name).exists()} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc", "_build.json"))]


def test_an_editable_installation(checkout, tmp_path):
    """One folder on sys.path, which type checkers follow and which offers the package alone."""
    run(checkout, sys.executable, "setup.py", "-q", "editable_wheel", "-d", str(tmp_path))
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        (entry,) = (name for name in packed.namelist() if name.endswith(".pth"))
        folder = Path(packed.read(entry).decode().strip())
    assert [path.name for path in folder.iterdir()] == ["fastpeft"]
    code = "import fastpeft.kernels._strategy_table as kernels; print(kernels.__file__)"
    said = run(tmp_path, sys.executable, "-c", code, PYTHONPATH=str(folder)).stdout.strip()
    assert said == str(checkout / "kernels/_strategy_table.py") and (folder / "fastpeft/py.typed").exists()


def test_torch_is_fetched_where_something_is_compiled(monkeypatch):
    """An isolated build's requirements."""
    monkeypatch.setenv("FASTPEFT_CPP", "auto")
    monkeypatch.setenv("CXX", "compiler")
    module = runpy.run_path(str(ROOT / "setup_commands.py"))
    monkeypatch.setattr(shutil, "which", lambda name, path=None: name)
    assert module["get_requires_for_build_wheel"]() == module["COMPILES"]
    monkeypatch.setattr(shutil, "which", lambda name, path=None: None)
    assert module["get_requires_for_build_editable"]() == module["get_requires_for_build_sdist"]() == []


def test_sources_are_packed_without_torch(monkeypatch, tmp_path):
    """An extension that cannot be compiled there is an error only where a build asks for it."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    monkeypatch.setenv("FASTPEFT_CPP", "1")
    monkeypatch.setitem(sys.modules, "pybind11", None)
    if cpp_lack := runpy.run_path("setup.py")["cpp_lack"]():
        pytest.skip(cpp_lack)
    made = runpy.run_path("setup.py")["options"]()
    assert made["ext_modules"] == []
    build = made["cmdclass"]["build_ext"](setuptools.Distribution())
    with pytest.raises(SystemExit, match="FASTPEFT_CPP must be 0 or auto where pybind11 is not installed"):
        build.run()


def test_one_range_of_pythons():
    """In the metadata, its classifiers and the README."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = [int(text.rpartition(".")[2]) for text in project["classifiers"] if "Python :: 3." in text]
    assert listed == list(range(listed[0], listed[-1] + 1))
    assert project["requires-python"] == f">=3.{listed[0]},<3.{listed[-1] + 1}"
    assert f"Python 3.{listed[0]} to 3.{listed[-1]}" in (ROOT / "README.md").read_text()


def test_cuda_without_cpp(checkout):
    done = run(checkout, sys.executable, "setup.py", "--version", check=False, FASTPEFT_CUDA="1")
    assert done.returncode != 0 and "FASTPEFT_CUDA must be 0 or auto where FASTPEFT_CPP is 0, got 1" in done.stderr


def test_windows(monkeypatch):
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    monkeypatch.chdir(ROOT)
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    setup = runpy.run_path("setup.py")
    monkeypatch.setenv("FASTPEFT_CPP", "auto")
    monkeypatch.setattr(sys, "platform", "win32")
    assert "not GCC or Clang" in setup["cpp_lack"]()
    monkeypatch.setenv("FASTPEFT_CPP", "1")
    with pytest.raises(SystemExit, match="FASTPEFT_CPP must be 0 or auto where the compiler is not GCC or Clang"):
        setup["options"]()


class Failing:
    """A build_ext whose compilers fail for the parts of ``fail``."""

    fail = ("cuda", "cpp")

    def __init__(self, folder):
        self.inplace, self.build_lib, self.extensions, self.tried = False, str(folder), None, []

    def run(self):
        self.inplace = None
        (extension,) = self.extensions
        self.tried.append(extension.part)
        if extension.part in self.fail:
            raise RuntimeError(f"no {extension.part}\nmore")


@pytest.mark.parametrize(
    ("fail", "asked", "tried", "left_out"),
    [
        ((), {}, ["cuda"], []),
        (("cuda",), {}, ["cuda", "cpp"], ["CUDA kernels"]),
        (("cuda", "cpp"), {}, ["cuda", "cpp"], ["CUDA kernels", "C++ kernels"]),
        (("cuda", "cpp"), {"FASTPEFT_CPP": "1"}, ["cuda", "cpp"], RuntimeError),
        (("cuda",), {"FASTPEFT_CUDA": "1"}, ["cuda"], RuntimeError),
        (("cuda",), {"FASTPEFT_WERROR": "1"}, ["cuda"], RuntimeError),
    ],
)
def test_compilers_that_fail(monkeypatch, tmp_path, fail, asked, tried, left_out):
    """CUDA is left out first, then all; nothing that was asked for, and nothing in CI."""
    for name in ("FASTPEFT_CPP", "FASTPEFT_CUDA", "FASTPEFT_WERROR"):
        monkeypatch.setenv(name, asked.get(name, "auto"))
    module = runpy.run_path(str(ROOT / "setup_commands.py"))
    monkeypatch.setitem(module["commands"].__globals__, "_stamp", lambda: "stamp.cpp")
    plans = [SimpleNamespace(part=part, sources=[]) for part in ("cuda", "cpp")]
    made = module["commands"](plans, type("Base", (Failing,), {"fail": fail}))
    build = made["cmdclass"]["build_ext"](tmp_path)
    if left_out is RuntimeError:
        with pytest.raises(RuntimeError, match="no c"):
            build.run()
        assert build.tried == tried
        return
    build.run()
    record = json.loads((tmp_path / "fastpeft" / "_build.json").read_text())["left_out"]
    assert build.tried == tried and list(record) == left_out
    assert all(f"their build failed (no {part};" in why for part, why in zip(fail, record.values(), strict=True))


def test_one_build_at_a_time(checkout):
    fcntl = pytest.importorskip("fcntl", reason="no file locks here")
    with open(checkout / "setup.py") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        command = [sys.executable, "setup.py", "-q", "egg_info"]
        other = subprocess.Popen(command, cwd=checkout, env=environment(), stderr=subprocess.PIPE, text=True)
        assert other.stderr.readline() == "fastpeft: waiting for another build in this clone\n"
        assert other.poll() is None
    assert other.wait(timeout=60) == 0
    other.stderr.close()


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_words_of_the_makefile(checkout):
    """Every word makes its environment on a fresh clone, none where PYTHON is given, and anew for another TORCH."""
    words = ("demo", "test", "lint", "type", "kernels", "cuda", "model", "bench", "roof", "sanitize")
    for word in words:
        assert "-m venv" in run(checkout, "make", "-n", word, "VENV=.none").stdout, word
    assert "-m venv" not in run(checkout, "make", "-n", *words, "PYTHON=python3", "VENV=.none").stdout

    done = checkout / ".venv" / ".done"
    done.parent.mkdir()
    done.write_text("torch==1\n")
    os.utime(done, (2**31, 2**31))
    assert "pip install" not in run(checkout, "make", "-n", "env", "TORCH=torch==1").stdout
    assert '"torch==2"' in run(checkout, "make", "-n", "env", "TORCH=torch==2").stdout

    (checkout / ".venv" / "pyvenv.cfg").touch()  # and no pip
    (checkout / "bin").mkdir()
    for name, line in {"python3": 'echo "$@" > made; exit 1', "test": 'exec /usr/bin/test "$@"'}.items():
        (checkout / "bin" / name).write_text(f"#!/bin/sh\n{line}\n")
        (checkout / "bin" / name).chmod(0o755)
    run(checkout, "make", "env", check=False, PATH=f"{checkout / 'bin'}:{os.environ['PATH']}")
    assert (checkout / "made").read_text() == "-m venv --clear .venv\n"


@pytest.mark.parametrize("compiler", ["aarch64-linux-gnu-g++", "clang++"])
@pytest.mark.parametrize("name", ["simd/dispatch", "simd/isa_base", "cpu/lora_adapter"])
def test_compiles_without_a_warning(compiler, name, tmp_path):
    """For another processor, and by another compiler, than CI's build; unused functions are found by code alone."""
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    import pybind11

    flags = ["-std=c++17", "-O0", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Werror"]
    includes = [*cpp_extension.include_paths(), pybind11.get_include(), sysconfig.get_paths()["include"]]
    command = [
        compiler,
        "-c",
        *flags,
        "-fvisibility=hidden",
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
        f"-I{ROOT / 'csrc'}",
    ]
    command += [part for path in includes for part in ("-isystem", path)]
    done = subprocess.run([*command, ROOT / f"csrc/{name}.cpp", "-o", tmp_path / "o"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
