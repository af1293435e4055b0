"""The experiments beside the vendor's GEMM: right within bf16's rounding, then timed in turns. A hang costs this stage.

A GPU of compute capability 9 alone; a dry run goes through the one-kernel launches under Triton's interpreter, which
Gluon has none of.
"""

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor

from common.timing import Race

SHAPES = ((8192, 4096, 4096), (8192, 14336, 4096), (8192, 4096, 14336))  # M, N, K
TINY = ((512, 256, 256),)
RANK, SCALE = 16, 2.0
LIMIT = 0.02  # of the largest value: a kernel that is wrong is not timed


def operands(M: int, N: int, K: int, device: str, dtype: torch.dtype) -> SimpleNamespace:
    gen = torch.Generator(device=device).manual_seed(0)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=gen, device=device) * std).to(dtype)

    t = SimpleNamespace(x=normal(M, K), w=normal(N, K, std=K**-0.5), dy=normal(M, N), a=normal(RANK, K, std=K**-0.5),
                        b=normal(N, RANK, std=0.1))  # fmt: skip
    t.s = t.x @ t.a.t()
    return t


def _exact(t: SimpleNamespace) -> dict[str, tuple[Tensor, ...]]:
    x, w, dy, a, b, s = (getattr(t, name).float() for name in ("x", "w", "dy", "a", "b", "s"))
    ds = SCALE * dy @ b
    y = x @ w.t() + SCALE * s @ b.t()
    return {"forward": (y,), "backward": (dy @ w + ds @ a, ds.t() @ x, SCALE * s.t() @ dy)}


def gluon_lacks() -> str | None:
    """Why the Gluon kernels cannot be compiled here: their names are those of Triton 3.6, and later releases differ."""
    try:
        from triton.experimental.gluon import language
    except ImportError as missing:
        return str(missing)
    return None if hasattr(language, "thread_barrier") else "their names are those of Triton 3.6"


def experiments(t: SimpleNamespace, processors: int, gluon: bool) -> dict[str, tuple[str, Callable[[], object]]]:
    """(what it computes, the launch) by name."""
    from experiments import one_kernel

    scaled = SCALE * t.b
    backward = lambda: one_kernel.backward(t.dy, t.x, t.w, t.a, t.b, t.s, SCALE, processors)  # noqa: E731
    out: dict[str, tuple[str, Callable[[], object]]] = {
        "one kernel, forward": ("forward", lambda: one_kernel.forward(t.x, t.w, t.a, scaled, processors)[0]),
        "one kernel, backward": ("backward", backward),
    }
    if gluon:
        from experiments import gluon_gemm, gluon_helpers

        helped = lambda: gluon_helpers.gemm_helped(t.x, t.w, t.a, scaled, processors)  # noqa: E731
        out["Gluon GEMM with the LoRA step"] = "forward", lambda: gluon_gemm.gemm(t.x, t.w, t.s, scaled, processors)
        out["Gluon GEMM with helper warps"] = "forward", helped
    return out


def _gap(found: object, exact: tuple[Tensor, ...]) -> float:
    each = found if isinstance(found, tuple) else (found,)
    return max(float((a.float() - b).abs().max() / b.abs().max()) for a, b in zip(each, exact, strict=True))


def run(stage) -> dict:
    cuda = stage.device == "cuda"
    if cuda and torch.cuda.get_device_capability()[0] != 9:
        stage.say("experiments: left out, they are written for compute capability 9")
        return {"ok": True, "left_out": "they are written for compute capability 9"}
    processors = torch.cuda.get_device_properties(0).multi_processor_count if cuda else 4
    lacks = gluon_lacks() if cuda else "it has no interpreter"
    if lacks:
        stage.say(f"experiments: Gluon's are left out, {lacks}")
    dtype = torch.bfloat16 if cuda else torch.float16  # the interpreter multiplies bf16 as the integers of its bits
    errors: list[str] = []
    for M, N, K in TINY if stage.tiny else SHAPES:
        label = f"{M}x{K}->{N}"
        t = operands(M, N, K, stage.device, dtype)
        exact = _exact(t)
        calls: dict[str, Callable[[], object]] = {
            "vendor forward": lambda t=t: t.x @ t.w.t(), "vendor backward": lambda t=t: t.dy @ t.w
        }  # fmt: skip
        of = {}
        for name, (what, call) in experiments(t, processors, lacks is None).items():
            try:
                gap = _gap(call(), exact[what])
                if cuda:
                    torch.cuda.synchronize()
            except Exception as problem:  # a sketch that does not compile or run is a result
                errors.append(f"{name} {label}: {type(problem).__name__}: {str(problem)[:160]}")
                stage.say(f"experiment {errors[-1]}")
                continue
            stage.row("experiment", f"{label} {name} error", error=gap)
            if not gap <= LIMIT:
                errors.append(f"{name} {label}: differs by {gap:.3g} of the largest value")
                stage.say(f"experiment {errors[-1]}")
                continue
            calls[name], of[name] = call, (what, gap)
        rounds = 1 if stage.tiny else 15
        race = Race(calls, stage.device).run(min(6.0, stage.left() / 3), min_rounds=min(5, rounds), max_rounds=rounds)
        rows = {side: race.summary(f"vendor {side}") for side in exact}
        for name, (what, gap) in of.items():
            row = rows[what][name]
            stage.row("experiment", f"{label} {name}", us=1e6 * row["median_s"], ratio=row["ratio"], error=gap)
            stage.say(f"experiment {label} {name}: {1e6 * row['median_s']:.1f} us, {row['ratio']:.3f} of the vendor's "
                      f"[{row['ratio_q1']:.3f}, {row['ratio_q3']:.3f}], error {gap:.1e}")  # fmt: skip
        del t, exact, calls, race
    return {"ok": not errors, "errors": errors}
