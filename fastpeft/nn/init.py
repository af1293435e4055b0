"""First values of lora_A and lora_B.

    kaiming      A ~ U(-1/√K, 1/√K), B = 0       nn.Linear's own; loralib's and PEFT's default
    gaussian     A ~ N(0, 1/r²), B = 0           PEFT's "gaussian": standard deviation 1/r
    randn        A ~ N(0, 1), B = 0              belongs with a fixed scaling of 0.01, not with α/r
    orthogonal   A, B ≠ 0 but B A = 0            PEFT's "orthogonal"; r even
    pissa        s B A = the r leading singular triples of W, taken out of W      Meng et al. 2024, arXiv:2404.02948
    pissa_niter_<n>    the same from a randomised SVD of n power iterations       Halko et al. 2011, arXiv:0909.4061
    olora        B, A = the r first columns and rows of W = Q R, s B A out of W      Büyükakyüz 2024, arXiv:2406.01775

Every scheme leaves the output of the adapted layer as it was; pissa and olora do so up to the rounding of the rest of
W to W's dtype. A pretrained W loaded after them would count the part in B A twice: load first, then adapt.
"""

from __future__ import annotations

import math

import torch

from fastpeft.ops import _checks

SCHEMES = ("kaiming", "gaussian", "randn", "orthogonal", "pissa", "pissa_niter_<n>", "olora")


def _niter(init: str) -> int | None:
    """n of ``pissa_niter_<n>``; None where the name is another one."""
    head, _, n = init.rpartition("_")
    return int(n) if head == "pissa_niter" and n.isdecimal() else None


def needs_weight(init: str) -> bool:
    """Whether the scheme reads the base weight and takes the update out of it."""
    return init in ("pissa", "olora") or _niter(init) is not None


def check(op: str, init: object, rank: int, in_features: int, out_features: int, scaling: float, base: bool) -> None:
    """Check that ``initialise`` can serve, before anything is built.

    Raises     ValueError: an unknown scheme, a rank or scaling that it cannot serve, or no base weight for it.
    """
    known = isinstance(init, str) and (init in SCHEMES[:5] or needs_weight(init))
    _checks.require(known, op, "init", f"be one of {', '.join(SCHEMES)}", repr(init))
    assert isinstance(init, str)
    if init == "orthogonal":
        _checks.require(rank % 2 == 0, op, "rank", "be even for init='orthogonal'", rank)
    if needs_weight(init):
        _checks.require(base, op, "init", "be a scheme that needs no base weight", repr(init))
        most = min(in_features, out_features)
        _checks.require(rank <= most, op, "rank", f"be at most min(in, out) = {most} for init={init!r}", rank)
        _checks.require(scaling > 0, op, "scaling", f"be positive for init={init!r}", scaling)


@torch.no_grad()
def initialise(init: str, a: torch.Tensor, b: torch.Tensor, scaling: float, weight: torch.Tensor | None = None) -> None:
    """Fill ``a`` [R, K] and ``b`` [N, R] in place, any strides and float dtype; ``check`` has passed.

    weight     [N, K] fp32 | bf16 | fp16 | fp64, changed in place by pissa and olora only
    scaling    what B A is multiplied by
    Raises     torch.linalg.LinAlgError: a weight that is not finite; nothing has been written then.
    """
    if needs_weight(init):
        assert weight is not None
        # Parameters without storage are filled from a checkpoint, which brings the rest of W with it.
        if not weight.is_meta:
            _from_weight(init, a, b, scaling, weight)
        return
    if init == "orthogonal":
        _orthogonal(a, b)
        return
    if init == "kaiming":
        torch.nn.init.kaiming_uniform_(a, a=math.sqrt(5))
    else:
        a.normal_(0.0, 1.0 / a.shape[0] if init == "gaussian" else 1.0)
    b.zero_()


def _orthogonal(a: torch.Tensor, b: torch.Tensor) -> None:
    """A in the span of one half of an orthonormal basis of rank space, B in that of the other: so B A = 0."""
    rank, half = a.shape[0], a.shape[0] // 2
    basis = torch.linalg.qr(torch.randn(rank, rank, device=a.device))[0]
    # The factor 1/10 is PEFT's.
    a.copy_(basis[0::2].t() @ torch.randn(half, a.shape[1], device=a.device) / 10)
    b.copy_(torch.randn(b.shape[0], half, device=a.device) @ basis[1::2] / 10)


def _from_weight(init: str, a: torch.Tensor, b: torch.Tensor, scaling: float, weight: torch.Tensor) -> None:
    rank, niter = a.shape[0], _niter(init)
    w = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if init == "olora":
        q, r = torch.linalg.qr(w)
        left, right = q[:, :rank], r[:rank]
    else:
        if niter is None:
            u, sigma, vh = torch.linalg.svd(w, full_matrices=False)
        else:
            u, sigma, v = torch.svd_lowrank(w, rank, niter=niter)
            vh = v.t()
        root = (sigma[:rank] / scaling).sqrt()
        left, right = u[:, :rank] * root, root.unsqueeze(1) * vh[:rank]
    a.copy_(right)
    b.copy_(left)
    # From the factors as stored, so that the rest of W makes up for their rounding.
    weight.copy_(w - scaling * (b.to(w.dtype) @ a.to(w.dtype)))
