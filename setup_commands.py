"""What setup.py adds to setuptools: a record of what a build leaves out, and one build at a time in a clone.

This is also the build backend of pyproject.toml: setuptools' own, but it requires torch only if something is compiled.
"""

import contextlib
import json
import os
import runpy
import shlex
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import Any

from setuptools import Distribution
from setuptools.build_meta import (  # noqa: F401  the hooks of PEP 517 and 660, looked up here by name
    build_editable,
    build_sdist,
    build_wheel,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

SWITCHES = {"C++ kernels": "FASTPEFT_CPP", "CUDA kernels": "FASTPEFT_CUDA"}
COMPILES = ["torch>=2.10", "ninja", "pybind11>=2.13"]
"""What a build that compiles needs besides setuptools."""
EDITABLE = Path(".editable")
"""The folder that an editable installation puts on sys.path."""
LEFT_OUT: dict[str, str] = {}
"""part -> why it is left out; fastpeft.info() reports it."""


def wanted(switch: str) -> str:
    value = os.environ.get(switch, "auto")
    if value not in ("0", "1", "auto"):
        sys.exit(f"fastpeft: {switch} must be 0, 1 or auto, got {value!r}")
    return value


def cpp_lack() -> str | None:
    """Why csrc/ is not compiled here, or None."""
    if wanted("FASTPEFT_CPP") == "0":
        return "FASTPEFT_CPP is 0"
    if sys.platform == "win32":
        return "the compiler is not GCC or Clang, for which csrc/ is written"
    compilers = (*shlex.split(os.environ.get("CXX", "c++"))[:1], "g++", "clang++")
    return None if any(map(shutil.which, compilers)) else "no C++ compiler is found"


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    """torch is gigabytes: an isolated build fetches it only if there is something to compile."""
    return [] if cpp_lack() else COMPILES


get_requires_for_build_editable = get_requires_for_build_wheel


def get_requires_for_build_sdist(config_settings: Any = None) -> list[str]:
    return []


def leave_out(part: str, why: str) -> None:
    """Record that ``part`` is not built; exit if its switch demands it."""
    asked = wanted(SWITCHES[part])
    if asked == "1":
        sys.exit(f"fastpeft: {SWITCHES[part]} must be 0 or auto where {why}, got 1")
    LEFT_OUT[part] = f"{SWITCHES[part]}=0" if asked == "0" else why


def _say(text: str) -> None:
    """Print on stderr, and on pip's too: without -v, pip hides the output of a build that succeeds."""
    print(text, file=sys.stderr)
    if {"_PYPROJECT_HOOKS_BUILD_BACKEND", "PEP517_BUILD_BACKEND"} & os.environ.keys():  # the latter before pip 23.3
        path = Path(f"/proc/{os.getppid()}/fd/2")
        with contextlib.suppress(OSError):
            if not path.is_file():  # pip would overwrite the text in a file
                path.write_text(text + "\n")


def _stamp() -> str:
    """A source file with the version and the hash of the sources; separate, so that it alone is recompiled."""
    version = runpy.run_path("fastpeft/_version.py")
    values = {"version": version["__version__"], "sources": version["source_hash"](Path("csrc"))}
    lines = [f'extern const char* const {name};\nconst char* const {name} = "{values[name]}";' for name in values]
    text = "\n".join(["// Written by setup.py.", "namespace fastpeft {", *lines, "}", ""])
    path = Path("build/stamp.cpp")
    path.parent.mkdir(exist_ok=True)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
    return str(path)


class _OneAtATime(Distribution):
    """Two builds in one clone share build/ and fastpeft.egg-info: the second waits until the first one has ended."""

    _lock: Any = None

    def run_command(self, command: str) -> None:
        if self._lock is None:
            self._lock = open("setup.py")  # noqa: SIM115
            # Windows has no fcntl, but compiles nothing; on a file system without locks the build goes on unlocked.
            with contextlib.suppress(ImportError, OSError):
                import fcntl

                try:
                    fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    _say("fastpeft: waiting for another build in this clone")
                    fcntl.flock(self._lock, fcntl.LOCK_EX)
        if command == "editable_wheel":
            self._link()
        super().run_command(command)

    def _link(self) -> None:
        """Make a folder for sys.path that holds nothing but a link to fastpeft/.

        A type checker follows the link, but not setuptools' import hook. The checkout itself on sys.path would make its
        kernels/ and tests/ importable for everyone; fastpeft/kernels.py finds kernels/ anyway.
        """
        with contextlib.suppress(OSError):  # Windows, where links need a privilege, keeps the import hook
            EDITABLE.mkdir(exist_ok=True)
            if not (EDITABLE / "fastpeft").exists():
                (EDITABLE / "fastpeft").symlink_to(Path("../fastpeft"), target_is_directory=True)
            self.packages = [name for name in self.packages if name != "fastpeft.kernels"]
            self.package_dir = {"": str(EDITABLE)}

    def has_ext_modules(self) -> bool:
        return True  # a wheel without the extension is platform-specific too: it was left out on that platform


class _Wheel(bdist_wheel):
    def run(self) -> None:
        if not self.skip_build:  # drop deleted modules and an extension that is now left out
            shutil.rmtree(self.get_finalized_command("build").build_lib, ignore_errors=True)
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        """Without the extension, a tag that ranks below a complete wheel's but still names platform and Python."""
        python, abi, platform = super().get_tag()
        return python, "none" if "C++ kernels" in LEFT_OUT else abi, platform


def commands(plans: list, base: type = build_ext, lack: str | None = None) -> dict:
    """setup()'s arguments for the first of ``plans`` that builds; each plan has fewer parts than the one before it.

    ``lack`` says why there are no plans, unless the parts are left out already: an error if a build demands a part.
    """

    class Build(base):
        def run(self) -> None:
            for part in SWITCHES if lack else ():
                leave_out(part, str(lack))
            inplace = self.inplace
            self.extensions = plans[:1]
            while self.extensions:
                self.extensions[0].sources = [*self.extensions[0].sources, _stamp()]
                try:
                    super().run()
                    break
                except Exception as error:  # the compiler, ninja and torch each raise their own type
                    self.inplace = inplace
                    self._do_without(error)
            self._record("fastpeft" if inplace else f"{self.build_lib}/fastpeft")

        def _do_without(self, error: Exception) -> None:
            part = "CUDA kernels" if len(plans) > 1 else "C++ kernels"
            if wanted(SWITCHES[part]) == "1" or os.environ.get("FASTPEFT_WERROR") == "1":
                raise error
            leave_out(part, f"their build failed ({str(error).splitlines()[0]}; pip install -v shows more)")
            failed = plans.pop(0)
            if plans:
                vars(failed).update(vars(plans[0]))
                plans[0] = failed
            self.extensions = plans[:1]

        def _record(self, folder: str) -> None:
            if not self.extensions:
                Path(folder, f"_C{sysconfig.get_config_var('EXT_SUFFIX')}").unlink(missing_ok=True)
            Path(folder).mkdir(parents=True, exist_ok=True)
            Path(folder, "_build.json").write_text(json.dumps({"left_out": LEFT_OUT}, indent=1) + "\n")
            for part, why in LEFT_OUT.items():
                _say(f"fastpeft: built without the {part}: {why}")

    cmdclass = {"build_ext": Build, "bdist_wheel": _Wheel}
    return {"ext_modules": plans[:1], "distclass": _OneAtATime, "cmdclass": cmdclass}
