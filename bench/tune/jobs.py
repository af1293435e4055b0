"""What the tuner times: the launcher call of every kernel's mode, its operands, and the same as a compile task."""

import importlib
from collections.abc import Callable
from types import SimpleNamespace

import torch

from compile.pool import captured
from fastpeft.kernels import _launch
from fastpeft.kernels._gpu import as_gpu
from tune import conv

SCALE, P = 2.0, 0.1
SHAPES = ((8192, 4096, 4096), (8192, 14336, 4096), (8192, 4096, 14336), (2048, 4096, 4096))  # M, N, K

# (op, mode) -> the launcher call that runs this mode's kernel; in order of what a training step spends.
JOBS: dict[tuple[str, str], Callable] = {
    ("lora_shrink", "dropout"): lambda m, t, tile: m.lora_shrink(t.x, t.a, P, t.seed, tile=tile),
    ("lora_shrink", "plain"): lambda m, t, tile: m.lora_shrink(t.x, t.a, 0.0, None, tile=tile),
    ("lora_grad_a", "dropout"): lambda m, t, tile: m.lora_grad_a(t.x, t.ds, t.a, P, t.seed, True, True, tile=tile),
    ("lora_grad_a", "plain"): lambda m, t, tile: m.lora_grad_a(t.x, t.ds, t.a, 0.0, None, True, True, tile=tile),
    ("lora_grad_b", "plain"): lambda m, t, tile: m.lora_grad_b(t.dy, t.s, t.b, SCALE, True, False, tile=tile),
    ("lora_expand", "plain"): lambda m, t, tile: m.lora_expand(t.s, t.b, None, None, SCALE, tile=tile),
    ("lora_linear_fused", "fwd"): lambda m, t, tile: m.lora_linear_fused_fwd(
        t.x, t.w, t.s, t.b, None, None, SCALE, tile=tile),
    ("lora_linear_fused", "dx"): lambda m, t, tile: m.lora_linear_fused_dx(t.dy, t.w, t.ds, t.a, P, t.seed, tile=tile),
    ("lora_grad_b", "rows"): lambda m, t, tile: m.lora_grad_b(t.dy, t.s, t.b, SCALE, False, False, tile=tile),
} | conv.JOBS  # fmt: skip


def tensors(M: int, N: int, K: int, R: int, dtype: torch.dtype, device: str) -> SimpleNamespace:
    gen = torch.Generator(device=device).manual_seed(0)

    def normal(*shape: int, std: float = 1.0, dtype: torch.dtype = dtype) -> torch.Tensor:
        return (torch.randn(shape, generator=gen, device=device) * std).to(dtype)

    return SimpleNamespace(
        x=normal(M, K), w=normal(N, K, std=K**-0.5), dy=normal(M, N), s=normal(M, R), ds=normal(M, R, std=0.1),
        a=normal(R, K, std=K**-0.5, dtype=torch.float32), b=normal(N, R, std=0.05, dtype=torch.float32),
        seed=torch.tensor([20260101], dtype=torch.int64, device=device),
    )  # fmt: skip


def compile_tile(op: str, mode: str, R: int, tile: dict) -> None:
    """A task of the pool: the kernel that this job's launcher runs with the tile, for the GPU of this process."""
    gpu = as_gpu(_launch.arch_of(torch.empty(0, device="cuda")))
    M, N, K = SHAPES[0]
    sizes = {"x": (M, K), "w": (N, K), "dy": (M, N), "s": (M, R), "ds": (M, R), "a": (R, K), "b": (N, R)}
    dtypes = {name: torch.float32 if name in "ab" else torch.bfloat16 for name in sizes}
    t = SimpleNamespace(
        **{name: torch.empty(size, dtype=dtypes[name], device="meta") for name, size in sizes.items()},
        seed=torch.empty(1, dtype=torch.int64, device="meta"),
    )
    with captured(gpu) as found:
        JOBS[op, mode](importlib.import_module(f"fastpeft.kernels.{op}"), t, tile)
    for each in found.values():
        each.compile()
