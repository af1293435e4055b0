"""Which GPUs and drivers the compiled CUDA kernels serve: another backend takes the others."""

import importlib
import sys

import pytest
import torch

extension = pytest.importorskip("fastpeft._C", reason="the extension is not built")
OURS = "8.0;8.6;8.9;9.0a;10.0;12.0+PTX"


def load(monkeypatch, archs=OURS, capabilities=((9, 0),), versions=(13000, 13000)):
    """A new import of fastpeft._cuda on a machine with such GPUs."""
    monkeypatch.setattr(extension, "build_info", lambda: {"cuda": archs})
    monkeypatch.setattr(extension, "cuda_versions", lambda: versions, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[device])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device}")
    monkeypatch.delitem(sys.modules, "fastpeft._cuda", raising=False)
    try:
        return importlib.import_module("fastpeft._cuda")
    finally:
        sys.modules.pop("fastpeft._cuda", None)


@pytest.mark.parametrize(
    "archs, capability, served",
    [
        *((OURS, capability, True) for capability in [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1), (13, 0)]),
        *((OURS, capability, False) for capability in [(7, 0), (7, 5), (8, 7), (11, 0)]),
        ("9.0a", (9, 0), True),
        ("9.0a", (10, 0), False),
        ("8.6", (8, 0), False),
        ("8.0+PTX", (9, 0), True),
        ("Hopper", (9, 0), True),
    ],
)  # fmt: skip
def test_gpus(monkeypatch, archs, capability, served):
    if served:
        assert load(monkeypatch, archs, [capability]).linear4bit_fwd
        return
    number = ".".join(map(str, capability))
    with pytest.raises(ImportError, match=f"GPU 0, of compute capability {number}, does not run"):
        load(monkeypatch, archs, [capability])


def test_every_gpu_counts(monkeypatch):
    with pytest.raises(ImportError, match=r"GPU 1, of compute capability 7\.5"):
        load(monkeypatch, capabilities=[(9, 0), (7, 5)])


def test_drivers(monkeypatch):
    assert load(monkeypatch, versions=(13020, 13000)) and load(monkeypatch, versions=(12000, 12080))
    with pytest.raises(ImportError, match="built with CUDA 13, for which the driver, of CUDA 12, is too old"):
        load(monkeypatch, versions=(12080, 13000))


def test_no_cuda(monkeypatch):
    with pytest.raises(ImportError, match="built without CUDA"):
        load(monkeypatch, archs="none")
    assert load(monkeypatch, capabilities=[], versions=None)  # where there is no GPU, nothing is asked of it
