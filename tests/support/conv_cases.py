"""Convolutions that bend an index, and the definition that their adapters are compared with."""

from dataclasses import dataclass, field

import torch
from torch.nn import functional as F

from fastpeft.reference.dropout import keep_factor, keep_mask

CONV = (F.conv1d, F.conv2d, F.conv3d)
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


@dataclass(frozen=True)
class ConvCase:
    why: str
    size: tuple
    C: int
    N: int
    R: int
    kernel: tuple
    options: dict = field(default_factory=dict)

    @property
    def groups(self):
        return self.options.get("groups", 1)

    def __str__(self):
        return self.why


CASES = [
    ConvCase("round", (4, 5), 16, 16, 4, (3, 3), {"padding": 1}),
    ConvCase("strided", (5, 5), 40, 24, 3, (3, 2), {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)}),
    ConvCase("groups", (3, 4), 36, 8, 5, (3, 2), {"groups": 2, "padding": 2, "dilation": 2}),
    ConvCase("space", (2, 3, 3), 12, 8, 3, (2, 2, 1), {"groups": 2, "padding": (1, 1, 0)}),
    ConvCase("wide", (5, 4), 300, 12, 20, (1, 1), {"stride": 2}),
    ConvCase("wide-groups", (3, 3), 520, 4, 2, (2, 2), {"groups": 2}),
    ConvCase("rank", (3, 3), 8, 12, 70, (2, 2)),
]


def make(case, dtype, batch=2, last=False, factors=torch.float32):
    """x, weight, lora_A, lora_B, bias, lora_bias: rounded to the dtypes under test."""
    K = case.C // case.groups * torch.Size(case.kernel).numel()
    x = torch.randn(batch, case.C, *case.size).to(dtype)
    if last:
        x = x.contiguous(memory_format=LAST[x.dim()])
    weight = (torch.randn(case.N, case.C // case.groups, *case.kernel) / K**0.5).to(dtype)
    a, b = (torch.randn(case.R, K) / K**0.5).to(factors), torch.randn(case.N, case.R).to(factors)
    return x, weight, a, b, torch.randn(case.N).to(dtype), torch.randn(case.N).to(factors)


def masked(x, p, seed):
    """drop(x): the mask of the channels-last rows of x."""
    if not p:
        return x
    rows = x.movedim(1, -1)
    mask = keep_mask(seed, rows[..., 0].numel(), x.shape[1], p, x.device)
    return x * (mask.view(rows.shape).movedim(-1, 1).to(x.dtype) * keep_factor(p))


def vendor(x, a, ds=None, dx=None, p=0.0, seed=None, **options):
    """s [M, groups · R], or with ds the gradients {da, dx}, by torch's convolution of drop(x) in x.dtype and channels-last."""
    x, a = x.detach().contiguous(memory_format=LAST[x.dim()]).requires_grad_(), a.detach().requires_grad_()
    thin = a.to(x.dtype).repeat(options.get("groups", 1), *[1] * (a.dim() - 1))
    s = CONV[x.dim() - 3](masked(x, p, seed), thin, **options)
    s = s.movedim(1, -1).reshape(-1, s.shape[1])
    if ds is None:
        return s.detach()
    s.backward(ds)
    return {"da": a.grad, "dx": dx + x.grad}


def definition(x, weight, a, b, bias, lora_bias, scale, p=0.0, seed=None, **options):
    """y = conv(x, W) + bias + scale · (conv1x1(conv(drop(x), A), B) + lora_bias), differentiated by torch."""
    groups, conv = options.get("groups", 1), CONV[weight.dim() - 3]
    if x.dim() in LAST:  # the format in which ours multiplies too
        x = x.contiguous(memory_format=LAST[x.dim()])
    thin = a.view(a.shape[0], *weight.shape[1:]).repeat(groups, *[1] * (weight.dim() - 1))
    s = conv(masked(x, p, seed), thin, **options)
    update = conv(s, b.view(*b.shape, *[1] * (weight.dim() - 2)), groups=groups) + lora_bias.view(
        -1, *[1] * (weight.dim() - 2)
    )
    return conv(x, weight, bias, **options) + scale * update
