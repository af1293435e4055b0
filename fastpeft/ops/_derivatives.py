"""Derivatives that no launcher gives: second derivatives, torch.func, forward mode, exported programs.

A call inside a transform, or traced for use without fastpeft, is `composed` of torch's own operations. A backward
whose gradients may be differentiated again, or that is itself inside a transform, is `derived`: the reference's formula
gives the same gradients, from saved tensors that carry the graph.

Beyond what the first derivative reads, that formula needs s = drop(x) Aᵀ with its graph. If x and A are both saved, s
is computed again. If one is not (a frozen A needs no x, a frozen x no A), s is a second output of the Function,
`linked`: its gradient comes back to the same backward, and no further tensor is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd import forward_ad

from fastpeft import dispatch
from fastpeft.ops import _calls, _checks
from fastpeft.ops.masks import unpack_mask

Masks = tuple["torch.Tensor | None", "torch.Tensor | None"] | None
"""Bits of A [R, ceil(K / 8)] and of Bᵀ [R, ceil(N / 8)]: see fastpeft/ops/masks.py."""

_transforms = torch._C._are_functorch_transforms_active
_tracing = torch._C._get_tracing_state
_compiling = torch.compiler.is_compiling
_batched = torch._C._functorch.is_legacy_batchedtensor  # of autograd.grad(..., is_grads_batched=True)


def composed(op: str, backend: str | None, compiling: bool) -> bool:
    """Whether a call must be made of torch's own operations: torch.func, forward mode, torch.jit.trace, torch.export.

    Raises     ValueError: it must, but ``backend`` is neither None nor "eager".
    """
    if not compiling:
        if forward_ad._current_level < 0 and not _transforms() and not _tracing():
            return False
    elif not torch.compiler._is_exporting_flag:
        # `is_exporting()` itself is True in all that Dynamo of torch 2.10 to 2.12 traces: no kernel of ours would run.
        return False
    asked = backend or dispatch.default
    rule = "be None or 'eager' inside torch.func, forward-mode differentiation, torch.jit.trace and torch.export"
    _checks.require(asked in (None, "eager"), op, "backend", rule, repr(asked))
    return True


_references: dict[str, Any] = {}


def _load() -> bool:
    # Filled in one step: torch.compile keeps the contents that it sees on its first read.
    if not _references:
        _references.update({launcher: dispatch.load(launcher, "eager") for launcher in dispatch.ROWS})
    return True


# As in dispatch.select: torch.compile must not trace an import. (A function that returns a function cannot be marked.)
_load._dynamo_marked_constant = True  # type: ignore[attr-defined]


def reference(launcher: str) -> Any:
    """The launcher in plain PyTorch: differentiable, and known to every transform and tracer."""
    _load()
    return _references[launcher]


def run(launcher: str, backend: str, *args: Any) -> Any:
    """``_library.call`` for a `composed` call."""
    return reference(launcher)(*args)


def derived(dy: torch.Tensor | None, ds: torch.Tensor | None) -> bool:
    """Whether a backward must use the formula; only if s is `linked` may dy be None, or ds be given."""
    if ds is not None or dy is None:
        return True
    if _compiling():  # torch.compile differentiates once
        return False
    return torch.is_grad_enabled() or forward_ad._current_level >= 0 or _transforms() or _batched(dy)


def linked(need_x: bool, need_w: bool, need_a: bool) -> bool:
    """Whether dB reads an s that depends on a tensor which is differentiated but not saved."""
    apart = not (need_a or need_w) if need_x else need_a
    return apart and not _compiling()


def stand_in(dy: torch.Tensor, like: tuple[torch.Size, torch.dtype]) -> torch.Tensor:
    """In place of a factor whose values no gradient reads: a launcher needs only its shape and dtype."""
    return dy.new_empty(like[0], dtype=like[1])


@contextmanager
def formula(dy: torch.Tensor | None, b: torch.Tensor, shape: torch.Size, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """dy [M, N] in ``dtype``, or zeros if only s was differentiated; autocast is off, as in a launcher."""
    with torch.autocast(b.device.type if dy is None else dy.device.type, enabled=False):
        if dy is None:
            yield b.new_zeros(shape[:-1].numel(), b.shape[0], dtype=dtype)
        else:
            yield _calls.rows(dy, dy.shape[-1], dtype)


def adapter(
    dy: torch.Tensor,
    ds: torch.Tensor | None,
    x: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor,
    s: torch.Tensor | None,
    scale: float,
    p: float,
    seed: torch.Tensor | None,
    need_dx: bool,
    need_da: bool,
    need_db: bool,
    mask_a: torch.Tensor | None = None,
    mask_b: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(the adapter's share of dx, da, db), differentiable; x and s are None if they were not saved."""
    a, b = masked(a, b, mask_a, mask_b)  # further derivatives go through the masked factors
    if need_db and need_dx and x is not None:  # then A was saved as well
        s = reference("lora_shrink")(x, a, p, seed)
    empty = dy.new_empty(0)
    through_b, db, _ = reference("lora_grad_b")(dy, empty if s is None else s, b, scale, need_db, False, mask_b)
    da, dx = reference("lora_grad_a")(
        empty if x is None else x, through_b if ds is None else through_b + ds, a, p, seed, need_dx, need_da, mask_a
    )
    return dx, da, db


def masked(
    a: torch.Tensor, b: torch.Tensor, mask_a: torch.Tensor | None, mask_b: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """A [R, K] and B [N, R] times their masks, which a transform must differentiate through."""
    a = a if mask_a is None else a * unpack_mask(mask_a, a.shape[1])
    return a, b if mask_b is None else b * unpack_mask(mask_b, b.shape[0]).t()


def bias_gradient(dy: torch.Tensor) -> torch.Tensor:
    """Σ over the rows, in fp32 or fp64."""
    return dy.sum(0, dtype=torch.promote_types(dy.dtype, torch.float32))
