"""Which GPUs and drivers the CUDA kernels of this build run on."""

from __future__ import annotations

import re

import torch

from fastpeft._extension import _C
from fastpeft._installed import left_out

# Embedded GPUs run only machine code compiled for their own architecture, not a desktop GPU's.
_EMBEDDED = {(8, 7), (11, 0)}


def _runs(arch: str, capability: tuple[int, int]) -> bool:
    """Whether code for an entry of TORCH_CUDA_ARCH_LIST, 8.0 at least, runs on a GPU, by CUDA's compatibility rules."""
    found = re.fullmatch(r"(\d+)\.(\d)(a?)(\+PTX)?", arch)
    if found is None:
        return True  # a name such as "Hopper": taken at its word
    built = int(found[1]), int(found[2])
    if built == capability or found[3]:
        return built == capability
    alike = built[0] == capability[0] and built <= capability and capability not in _EMBEDDED
    return alike or (found[4] is not None and built <= capability)


def unmet() -> str | None:
    """Why this build does not run on the GPUs of this process, or None."""
    archs = _C.build_info().get("cuda", "none")
    if archs == "none":
        why = left_out().get("CUDA kernels")
        return "was built without CUDA" + (f", as {why}" if why else "")
    if not torch.cuda.is_available():
        return None
    driver, runtime = _C.cuda_versions()
    if driver // 1000 < runtime // 1000:
        return f"was built with CUDA {runtime // 1000}, for which the driver, of CUDA {driver // 1000}, is too old"
    for device in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(device)
        if not any(_runs(arch, capability) for arch in archs.split(";")):
            name, number = torch.cuda.get_device_name(device), ".".join(map(str, capability))
            return f"was built for {archs}, which {name}, of compute capability {number}, does not run"
    return None
