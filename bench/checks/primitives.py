"""What a GPU has to prove about the launchers that lora_linear and the 4-bit products do not reach."""

import torch

from fastpeft import ops
from fastpeft.testing import EPS, error

SCALE = 2.0


def check_expand_add(ctx) -> str:
    """y += scale · s bᵀ in place, within the error budget of the reference."""
    M, N, R = (17, 40, 5) if ctx.tiny else (4097, 1001, 24)
    gen = torch.Generator(device=ctx.device).manual_seed(3)
    y, s, b = (torch.randn(shape, generator=gen, device=ctx.device) for shape in ((M, N), (M, R), (N, R)))
    shares = []
    for dtype in (ctx.dtype, torch.float32):
        given = y.to(dtype), s.to(dtype)
        exact = given[0].double() + SCALE * given[1].double() @ b.double().t()
        peer, ours = (
            ops.lora_expand_add(given[0].clone(), given[1], b, scale=SCALE, backend=backend)
            for backend in ("eager", "triton")
        )
        budget = 2 * (error(peer, exact) + EPS[dtype] * float(exact.abs().max()))
        shares.append(error(ours, exact) / budget)
        assert shares[-1] <= 1, f"{shares[-1]:.2f} of the error budget, {dtype}"
    return f"{len(shares)} dtypes, worst {max(shares):.0%} of the error budget"


def check_between(ctx) -> str:
    """A function of rank space: forward and gradients within the reference's error budget, on one seed."""
    M, K, N, R = (17, 32, 40, 5) if ctx.tiny else (2049, 1024, 776, 24)
    gen = torch.Generator(device=ctx.device).manual_seed(4)
    shapes = {"x": (M, K), "w": (N, K), "a": (R, K), "b": (N, R), "dy": (M, N)}
    given = {n: torch.randn(size, generator=gen, device=ctx.device) * size[1] ** -0.5 for n, size in shapes.items()}

    def step(backend: str, dtype: torch.dtype) -> list[torch.Tensor]:
        low = {n: given[n].to(ctx.dtype).to(dtype) for n in ("x", "w", "dy")}
        factors = torch.float64 if dtype == torch.float64 else torch.float32
        leaves = [low["x"].requires_grad_(), *(given[n].clone().to(factors).requires_grad_() for n in "ab")]
        torch.manual_seed(5)
        y = ops.lora_between(leaves[0], leaves[1], leaves[2], torch.tanh, weight=low["w"], dropout=0.1, backend=backend)
        return [y.detach(), *torch.autograd.grad(y, leaves, low["dy"])]

    gold, peer, ours = step("eager", torch.float64), step("eager", ctx.dtype), step("triton", ctx.dtype)
    shares = []
    for name, exact, low, mine in zip(("y", "dx", "da", "db"), gold, peer, ours, strict=True):
        share = error(mine, exact) / (2 * (error(low, exact) + EPS[ctx.dtype] * float(exact.abs().max())))
        assert share <= 1, f"{name}: {share:.2f} of the error budget"
        shares.append(share)
    return f"forward and gradients, worst {max(shares):.0%} of the error budget"


def check_convolution(ctx) -> str:
    """A strided and a grouped convolution with dropout: forward and gradients within the reference's error budget."""
    shares = []
    for groups, C, stride in ((1, 6, 2), (2, 8, 1)) if ctx.tiny else ((1, 136, 2), (2, 256, 1)):
        gen = torch.Generator(device=ctx.device).manual_seed(6)
        size = (2, C, 4, 3) if ctx.tiny else (4, C, 33, 30)
        x, w = (torch.randn(s, generator=gen, device=ctx.device) for s in (size, (C, C // groups, 3, 3)))
        a, b = (torch.randn(s, generator=gen, device=ctx.device) for s in ((5, C // groups * 9), (C, 5)))
        given = (x, w * C**-0.5 / 3, a * C**-0.5 / 3, b)

        def step(backend: str, dtype: torch.dtype, given=given, stride=stride, groups=groups) -> list[torch.Tensor]:
            low = [t.to(ctx.dtype).to(dtype) for t in given[:2]]
            factors = torch.float64 if dtype == torch.float64 else torch.float32
            leaves = [low[0].requires_grad_(), *(t.to(factors, copy=True).requires_grad_() for t in given[2:])]
            torch.manual_seed(7)
            y = ops.lora_conv2d(leaves[0], low[1], *leaves[1:], None, None, stride, 1, 1, groups, dropout=0.1,
                                path="accumulate", backend=backend)  # fmt: skip
            return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]

        gold, peer, ours = step("eager", torch.float64), step("eager", ctx.dtype), step("triton", ctx.dtype)
        for name, exact, low, mine in zip(("y", "dx", "da", "db"), gold, peer, ours, strict=True):
            share = error(mine, exact) / (2 * (error(low, exact) + EPS[ctx.dtype] * float(exact.abs().max())))
            assert share <= 1, f"{name}, {groups} groups: {share:.2f} of the error budget"
            shares.append(share)
    return f"forward and gradients, worst {max(shares):.0%} of the error budget"


def check_rank_space(ctx) -> str:
    """Both of the above, in one process."""
    return f"in place: {check_expand_add(ctx)}; between: {check_between(ctx)}"


CHECKS = {"convolution": check_convolution, "rank space": check_rank_space}
