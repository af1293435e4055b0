"""Inputs of the operator tests: made once in fp64 from the test's seed, then rounded to the dtypes under test."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from fastpeft import dispatch, ops

FLOATS = [torch.float32, torch.bfloat16, torch.float16]


@dataclass(frozen=True)
class Case:
    M: int
    K: int
    N: int
    R: int
    why: str

    def __str__(self) -> str:
        return f"{self.why}-{self.M}x{self.K}x{self.N}r{self.R}"


CASES = [
    Case(96, 256, 256, 16, "round"),
    Case(7, 33, 65, 3, "odd"),
    Case(1, 64, 48, 8, "row"),
    Case(0, 16, 8, 4, "empty"),
    Case(130, 300, 515, 24, "ragged"),
    Case(5, 20, 40, 256, "wide"),
    Case(64, 384, 1536, 8, "minilm"),
    Case(33, 576, 192, 1, "gqa"),
]
# Under Triton's interpreter a program costs milliseconds: the shapes that bend an index, and no others.
SMALL = [
    Case(17, 33, 65, 3, "odd"),
    Case(1, 48, 32, 8, "row"),
    Case(0, 16, 8, 4, "empty"),
    Case(33, 300, 40, 24, "blocks"),
]


def unless_served(op: str, backend: str, dtype: torch.dtype, device: str = "cpu") -> list:
    """The marks of a test of ``op``: a skip, with what the backend lacks here."""
    missing = dispatch.unmet(op, backend, device, dtype)
    return [pytest.mark.skip(reason=f"{backend} requires {missing}")] if missing else []


def backend_cases(op: str) -> list:
    """(backend, case, dtype) for everything that can run here; bf16 products of Triton's interpreter are not reliable."""
    params = []
    for backend in ("cpp", "triton"):
        marks = unless_served(op, backend, torch.float16)
        for case in CASES if backend == "cpp" else SMALL:
            for dtype in FLOATS if backend == "cpp" else (torch.float32, torch.float16):
                name = f"{backend}-{case}-{str(dtype)[6:]}"
                if dispatch.ROWS[op].get(backend):
                    params.append(pytest.param(backend, case, dtype, marks=marks, id=name))
    return params


def normal(*shape: int, dtype: torch.dtype = torch.float32, std: float = 1.0) -> torch.Tensor:
    """Values that are exact in ``dtype`` and so the same in every computation of a test."""
    return (torch.randn(*shape, dtype=torch.float64) * std).to(dtype)


def wide(values: dict, dtype: torch.dtype) -> dict:
    """The same values with every tensor of the call in ``dtype`` (the seed apart)."""
    return {
        key: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for key, value in values.items()
    }


def linear_call(values: dict, backend: str, *, scale: float, p: float, seed: int) -> dict[str, torch.Tensor]:
    """y and every gradient of lora_linear for leaves with ``values`` (dy among them)."""
    leaves = {
        name: value.detach().clone().requires_grad_(name != "weight")
        for name, value in values.items()
        if value is not None and name != "dy"
    }
    for name in ("lora_A", "lora_B"):
        if not values[name].is_contiguous():  # keep the strides under test
            leaves[name] = values[name].detach().t().clone().t().requires_grad_()
    torch.manual_seed(seed)
    y = ops.lora_linear(
        leaves["x"],
        leaves["weight"],
        leaves["lora_A"],
        leaves["lora_B"],
        leaves.get("bias"),
        leaves.get("lora_bias"),
        scale=scale,
        dropout=p,
        backend=backend,
    )
    y.backward(values["dy"])
    return {"y": y.detach()} | {f"d{name}": leaf.grad for name, leaf in leaves.items() if leaf.requires_grad}
