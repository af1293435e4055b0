"""One thread, seeds from the test's id, memory full of NaN, and Triton's interpreter where there is no GPU."""

import importlib.metadata
import os

import pytest
import torch
from packaging.version import Version


def version_of(name: str) -> Version | None:
    try:
        return Version(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return None


if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read by triton on import
    triton, numpy = version_of("triton"), version_of("numpy")
    if triton and numpy and triton < Version("3.7") and numpy >= Version("2.4"):
        raise pytest.UsageError("the interpreter of triton 3.6 needs numpy < 2.4: pip install 'numpy<2.4'")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)

from fastpeft import dispatch
from fastpeft.testing import poisoned_empty, seed_of


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """In a clone where nothing is built: what is parametrised with the C++ backend, or marked ``cpp``, is skipped."""
    # Minutes in one test: last, it would leave the other process of `make test` idle.
    items.sort(key=lambda item: item.get_closest_marker("upstream") is None)
    missing = dispatch.unmet("lora_linear_fwd", "cpp", "cpu", torch.float32)
    for item in items if missing else ():
        call = getattr(item, "callspec", None)
        if item.get_closest_marker("cpp") or (call is not None and call.params.get("backend") == "cpp"):
            item.add_marker(pytest.mark.skip(reason=f"cpp requires {missing}"))


@pytest.fixture(autouse=True)
def _seeded(request: pytest.FixtureRequest) -> None:
    torch.manual_seed(seed_of(request.node.nodeid))


@pytest.fixture
def poisoned():
    """torch.empty gives NaN: an element that a kernel did not write fails the comparison."""
    with poisoned_empty():
        yield


@pytest.fixture(scope="session")
def emulator_folder(tmp_path_factory):
    """Where the emulator's programs are built; a skip where they cannot be."""
    from emulator import build

    path = tmp_path_factory.mktemp("emulator")
    if build.compiler() is None:
        pytest.skip("the emulator is built by g++, which is not here")
    try:
        build.include_flags(path)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    return path


@pytest.fixture(scope="session")
def kernels(emulator_folder):
    """Every csrc/cuda/*.cu, built for the emulator."""
    from emulator.kernels import Kernels

    return Kernels(emulator_folder)


@pytest.fixture(params=["forward", "reverse", "random"])
def schedule(request, kernels):
    """The order in which the emulator runs threads."""
    kernels.schedule(request.param)
    yield
    kernels.schedule("forward")
