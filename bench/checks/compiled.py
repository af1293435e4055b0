"""What a GPU has to prove about torch.compile and CUDA graphs: dropout and its backward inside both.

A LoRA linear is linear in x for a fixed mask, and its gradient is the transposed map of that mask: <y, y> = <dx, x> for
the gradient of y towards y itself. The identity holds in any random state, so it needs no second run to compare with; a
backward that drew another mask breaks it by about the share of x that is dropped.
"""

import torch
from torch import Tensor

SCALE = 2.0


def _leaves(ctx, M: int, K: int, N: int, R: int) -> dict[str, Tensor]:
    gen = torch.Generator(device=ctx.device).manual_seed(M + K)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=gen, device=ctx.device) * std

    half = ctx.dtype
    return {
        "x": normal(M, K).to(half).requires_grad_(), "w": 0 * normal(N, K).to(half),
        "a": normal(R, K, std=K**-0.5).requires_grad_(), "b": normal(N, R, std=R**-0.5).requires_grad_(),
    }  # fmt: skip


def one_mask(y: Tensor, dx: Tensor, x: Tensor, budget: float = 0.02) -> float:
    """The gap of <y, y> = <dx, x>, dx the gradient of y towards y. AssertionError beyond `budget`: two masks."""
    y, dx, x = (each.detach().double() for each in (y, dx, x))
    gap = abs(1 - float((dx * x).sum() / y.square().sum()))
    assert gap <= budget, f"<y, y> and <dx, x> differ by {gap:.3g}: the backward has another mask"
    return gap


def check_adjoint(ctx) -> str:
    """The identity itself, without a compiler or a graph; and that another mask would break it."""
    from fastpeft.ops import lora_linear

    t = _leaves(ctx, *((33, 64, 48, 4) if ctx.tiny else (512, 1024, 768, 16)))
    results = []
    for _ in range(2):
        y = lora_linear(t["x"], t["w"], t["a"], t["b"], scale=SCALE, dropout=0.5)
        results.append((y.detach(), y))
    (first, graph), (second, _) = results
    right, wrong = (torch.autograd.grad(graph, t["x"], dy, retain_graph=True)[0] for dy in (first, second))
    gap = one_mask(first, right, t["x"])
    try:  # <D second, D first>, where the identity wants <second, second>
        one_mask(second, wrong, t["x"])
    except AssertionError:
        return f"<y, y> = <dx, x> within {gap:.1e}, and not with another call's mask"
    raise AssertionError("two calls share a mask")


def check_compile(ctx) -> str:
    """p = 0 against eager; p = 0.1 with one mask in forward and backward, another in the next call."""
    if ctx.device != "cuda":
        return "left out: the compiler's CPU code takes too long for a dry run"
    from fastpeft.ops import lora_linear

    t = _leaves(ctx, 128, 256, 192, 8)
    leaves = [t[n] for n in ("x", "a", "b")]

    def plain(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return lora_linear(x, t["w"], a, b, scale=SCALE).float().square().sum()

    def dropped(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return lora_linear(x, t["w"], a, b, scale=SCALE, dropout=0.1)

    eager = torch.autograd.grad(plain(*leaves), leaves)
    compiled = torch.autograd.grad(torch.compile(plain, fullgraph=True)(*leaves), leaves)
    for want, got in zip(eager, compiled, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2 * float(want.abs().max()))
    step = torch.compile(dropped, fullgraph=True)
    first, second = step(*leaves), step(*leaves)
    assert not torch.equal(first, second), "two calls share a mask"
    gap = one_mask(first, torch.autograd.grad(first, t["x"], first.detach())[0], t["x"])
    return f"fullgraph, forward and backward; with dropout one mask, gap {gap:.1e}"


def check_graph(ctx) -> str:
    """A replayed CUDA graph draws a fresh mask each time (the seed is read on the device)."""
    if ctx.device != "cuda":
        return "left out: needs CUDA graphs"
    from fastpeft.ops import lora_linear

    t = _leaves(ctx, 256, 512, 256, 16)
    args = (t["x"], t["w"], t["a"], t["b"])
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), torch.no_grad():
        for _ in range(2):
            lora_linear(*args, scale=SCALE, dropout=0.5)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        y = lora_linear(*args, scale=SCALE, dropout=0.5)
    replays = []
    for _ in range(3):
        graph.replay()
        replays.append(y.clone())
    assert not torch.equal(replays[0], replays[1]) and not torch.equal(replays[1], replays[2]), "replays share a mask"
    return "three replays, three masks"


def check_graphed_backward(ctx) -> str:
    """Forward and backward captured by make_graphed_callables: one mask in both, another in the next step."""
    if ctx.device != "cuda":
        return "left out: needs CUDA graphs"
    from fastpeft import LoRALinear

    t = _leaves(ctx, 256, 512, 256, 16)
    linear = torch.nn.Linear(512, 256, bias=False, device="cuda", dtype=ctx.dtype)
    torch.nn.init.zeros_(linear.weight)
    layer = LoRALinear.from_linear(linear, rank=16, alpha=32.0, dropout=0.1)
    with torch.no_grad():
        layer.lora_B.normal_(std=0.1)
    graphed = torch.cuda.make_graphed_callables(layer.train(), (t["x"].detach().clone().requires_grad_(),))
    outputs, gaps = [], []
    for _ in range(2):
        t["x"].grad = layer.lora_A.grad = layer.lora_B.grad = None
        y = graphed(t["x"])
        outputs.append(y.detach().clone())
        y.backward(outputs[-1])
        gaps.append(one_mask(outputs[-1], t["x"].grad, t["x"]))
        assert layer.lora_A.grad is not None and bool(layer.lora_A.grad.isfinite().all()), "no gradient of A"
    assert not torch.equal(*outputs), "two steps share a mask"
    return f"two steps, two masks, the same in forward and backward: gap {max(gaps):.1e}"


CHECKS = {
    "torch.compile": check_compile,
    "CUDA graph": check_graph,
    "graphed backward": check_graphed_backward,
    "adjoint": check_adjoint,
}
