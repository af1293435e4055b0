"""AdapterFusion: the outputs of several trained adapters, weighted by attention, in the space of their bottlenecks."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from fastpeft.nn.bottleneck.adapter import ACTIVATIONS, Adapter
from fastpeft.nn.config import flag, named_options, size
from fastpeft.ops import _checks


class AdapterFusion(nn.Module):
    """x + Σ_n p_n V δ_n,  p = softmax over n of (Q x) · (K δ_n)                  Pfeiffer et al. 2021, arXiv:2005.00247

    with δ_n = scale_n · (U_n a_n + b_n) the delta of adapter n, a_n = activation(D_n x + d_n).

    dim        size of x's last dimension
    adapters   two or more `Adapter`s of that dim, already trained; they are frozen here
    freeze_adapters    False leaves their requires_grad as it is
    Parameters query.weight, key.weight, value.weight [dim, dim]; value is the identity at init
    Input      x [..., dim]
    Output     as x
    Raises     ValueError: sizes, fewer than two adapters.  TypeError: no `Adapter`.

    Two stages: train each adapter alone, then the fusion over all of them. Written out, keys and values of N adapters
    are 1 + 2N products of dim × dim. Here (Q x) · (K U_n a_n) = (U_nᵀ u) · a_n with u = Kᵀ Q x, and Σ p_n V U_n a_n =
    V [U_1 … U_N] [p_1 a_1 … p_N a_N]: three, whatever N is, and nothing of size N · dim is formed.
    """

    @named_options
    def __init__(self, dim: int, adapters: Iterable[nn.Module], *, freeze_adapters: bool = True) -> None:
        op = type(self).__name__
        size(op, "dim", dim)
        listed = list(adapters)
        _checks.require(len(listed) >= 2, op, "adapters", "be two or more", len(listed))
        for adapter in listed:
            _checks.require_dtype(
                isinstance(adapter, Adapter), op, "adapters", "be Adapter modules", type(adapter).__name__
            )
            assert isinstance(adapter, Adapter)
            _checks.require(adapter.dim == dim, op, "adapters", f"be of dim {dim}", adapter.dim)
        flag(op, "freeze_adapters", freeze_adapters)
        super().__init__()
        self.dim = dim
        self.adapters = nn.ModuleList(listed)
        like = self._listed()[0].up.weight
        kind = {"device": like.device, "dtype": like.dtype}
        self.query, self.key, self.value = (nn.Linear(dim, dim, bias=False, **kind) for _ in range(3))
        self.reset_parameters()
        if freeze_adapters:
            self.adapters.requires_grad_(False)

    def _listed(self) -> list[Adapter]:
        return [adapter for adapter in self.adapters if isinstance(adapter, Adapter)]

    def reset_parameters(self) -> None:
        """Draw query and key as nn.Linear does; value is the identity. The adapters stay as they are."""
        self.query.reset_parameters()
        self.key.reset_parameters()
        nn.init.eye_(self.value.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        op, adapters = type(self).__name__, self._listed()
        _checks.activation(op, x)
        _checks.entrance(op, x, "query", self.dim, self.query.weight.device)
        sizes = [adapter.bottleneck for adapter in adapters]
        down = nn.functional.linear(
            x.to(adapters[0].down.weight.dtype),
            torch.cat([adapter.down.weight for adapter in adapters]),
            torch.cat([adapter.down.bias for adapter in adapters]),
        )
        hidden = [ACTIVATIONS[each.activation](part) * each.scale
                  for each, part in zip(adapters, down.split(sizes, dim=-1), strict=True)]  # fmt: skip
        up = torch.cat([adapter.up.weight for adapter in adapters], dim=1)  # [dim, Σ bottleneck]
        bias = torch.stack([adapter.up.bias * adapter.scale for adapter in adapters])  # [N, dim]
        u = nn.functional.linear(self.query(x.to(self.query.weight.dtype)), self.key.weight.t())
        seen = (u @ up).split(sizes, dim=-1)
        scores = torch.stack([(h * k).sum(-1) for h, k in zip(hidden, seen, strict=True)], dim=-1)
        scores = scores + u @ bias.t()
        p = scores.softmax(-1, torch.promote_types(scores.dtype, torch.float32)).to(u.dtype)
        weighed = torch.cat([h * p[..., n : n + 1] for n, h in enumerate(hidden)], dim=-1)
        fused = nn.functional.linear(weighed, up) + p @ bias
        return (x + self.value(fused)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, adapters={len(self.adapters)}"
