"""What a GPU has to prove about correctness, on the device, against the reference: a check returns one line, or raises.

gold = reference in fp64, peer = reference in the tested dtype; ours must stay within 2 * (err(peer) + eps * max|gold|).
"""

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from checks import compiled, fourbit, primitives, twins
from fastpeft import dispatch
from fastpeft.testing import EPS, error

SCALE = 2.0
WORKERS = 12
RANK_SHAPE = (300, 512, 768)
SHAPES = ((1, 4096, 4096), (1, 33, 57), (129, 1001, 777), (16384, 4096, 1024), (2048, 14336, 64), (64, 255, 4097))


@dataclass(frozen=True)
class Ctx:
    device: str  # "cuda", or "cpu" for a dry run (Triton under its interpreter)
    tiny: bool

    @property
    def dtype(self) -> torch.dtype:
        """bf16, but fp16 in a dry run: the interpreter multiplies bf16 operands as the integers of their bits."""
        return torch.float16 if self.device == "cpu" else torch.bfloat16

    def strategies(self) -> tuple[str, ...]:
        if self.device == "cuda" and dispatch.unmet("lora_linear_fused_fwd", "triton", "cuda", torch.bfloat16):
            return ("accumulate",)
        return ("accumulate", "fused")


def _operands(ctx: Ctx, M: int, K: int, N: int, R: int, dtype: torch.dtype) -> dict[str, Tensor]:
    gen = torch.Generator(device=ctx.device).manual_seed(M * 7919 + K * 31 + N * 17 + R)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=gen, device=ctx.device) * std

    return {
        "x": normal(M, K).to(dtype), "dy": normal(M, N).to(dtype), "w": normal(N, K, std=K**-0.5).to(dtype),
        "a": normal(R, K, std=K**-0.5), "b": normal(N, R, std=R**-0.5), "bias": normal(N).to(dtype),
        "seed": torch.tensor([2**40 + R], dtype=torch.int64, device=ctx.device),
    }  # fmt: skip


def _step(backend: str, t: dict[str, Tensor], p: float, **strategy: str) -> dict[str, Tensor]:
    """Forward and backward through one backend's launchers; Triton's take a strategy."""
    fwd, bwd = (dispatch.load(op, backend) for op in ("lora_linear_fwd", "lora_linear_bwd"))
    seed = t["seed"] if p else None
    y, s = fwd(t["x"], t["w"], t["a"], t["b"], t["bias"], None, SCALE, p, seed, **strategy)
    grads = bwd(t["dy"], t["x"], t["w"], t["a"], t["b"], s, SCALE, p, seed, True, True, True, True, **strategy)
    return dict(zip(("y", "dx", "da", "db", "dbias"), (y, *grads), strict=True))


def _compare(ctx: Ctx, M: int, K: int, N: int, R: int, dtype: torch.dtype, p: float, strategy: str) -> float:
    """Worst share of the error budget used. AssertionError beyond 1."""
    t = _operands(ctx, M, K, N, R, dtype)
    wide = {name: v.double() if v.is_floating_point() else v for name, v in t.items()}
    gold, peer, ours = _step("eager", wide, p), _step("eager", t, p), _step("triton", t, p, strategy=strategy)
    worst = 0.0
    for name, exact in gold.items():
        scale = float(exact.abs().max())
        budget = 2 * (error(peer[name], exact) + EPS[dtype] * scale)
        share = error(ours[name], exact) / budget if budget else error(ours[name], exact)
        assert share <= 1, (
            f"{name}: {share:.2f} of the error budget at M={M} K={K} N={N} R={R} {dtype} p={p} {strategy}"
        )
        worst = max(worst, share)
    return worst


def check_ranks(ctx: Ctx, ranks: tuple[int, ...]) -> str:
    """These ranks (a dry run: the first), both strategies, with and without dropout."""
    M, K, N = (17, 64, 64) if ctx.tiny else RANK_SHAPE
    dropouts: tuple[float, ...] = (0.0, 0.1)
    if ctx.tiny:
        ranks, dropouts = ranks[:1], dropouts[1:]
    shares = [
        _compare(ctx, M, K, N, R, ctx.dtype, p, strategy)
        for R in ranks for p in dropouts for strategy in ctx.strategies()
    ]  # fmt: skip
    return f"{len(shares)} cases, worst {max(shares):.0%} of the error budget"


def check_shapes(ctx: Ctx, dtype: torch.dtype) -> str:
    """Odd K and N, one row, many rows."""
    shapes = ((1, 40, 24), (5, 33, 57)) if ctx.tiny else SHAPES
    if dtype == torch.bfloat16:
        dtype = ctx.dtype
    shares = [_compare(ctx, *shape, 16, dtype, 0.1, "auto") for shape in shapes]
    return f"{len(shapes)} shapes, worst {max(shares):.0%} of the error budget"


def check_dropout_bits(ctx: Ctx) -> str:
    """The mask of every kernel that draws it, bit for bit the reference's."""
    from fastpeft.reference.dropout import keep_mask

    total = 0
    for M, K in [(9, 304)] if ctx.tiny else [(1, 1), (257, 4097), (4096, 4096)]:
        for p in (0.1, 0.5, 0.98):
            seed = torch.tensor([-(2**50) + 12345], dtype=torch.int64, device=ctx.device)
            expected = keep_mask(seed, M, K, p, ctx.device)
            ones = torch.ones(M, K, device=ctx.device, dtype=ctx.dtype)
            narrow, a = ones[:, :1].contiguous(), torch.ones(1, K, device=ctx.device)
            _, dx = dispatch.load("lora_grad_a", "triton")(ones, narrow, a, p, seed, True, False)
            assert torch.equal(dx != 0, expected), f"grad_a's mask differs at M={M} K={K} p={p}"
            span = min(K, 32)  # shrink with rows of the identity: s[:, r] is column (first + r) of drop(x)
            for first in {0, (K - span) // 2, K - span}:
                eye = torch.zeros(span, K, device=ctx.device)
                eye[torch.arange(span), first + torch.arange(span)] = 1.0
                s = dispatch.load("lora_shrink", "triton")(ones, eye, p, seed)
                assert torch.equal(s != 0, expected[:, first : first + span]), f"shrink's mask differs at {M}x{K} p={p}"
            if K % 8 == 0 and "fused" in ctx.strategies():
                zeros, w = ones.new_zeros(M, 64), ones.new_zeros(64, K)
                dx = dispatch.load("lora_linear_fused_dx", "triton")(zeros, w, narrow, a, p, seed)
                assert torch.equal(dx != 0, expected), f"the fused dX's mask differs at M={M} K={K} p={p}"
            total += M * K
    return f"masks equal bit for bit over {total:,} elements"


def check_deterministic(ctx: Ctx) -> str:
    t = _operands(ctx, *((33, 64, 64, 4) if ctx.tiny else (4096, 4096, 4096, 16)), ctx.dtype)
    for strategy in ctx.strategies():
        first, second = (_step("triton", t, 0.1, strategy=strategy) for _ in range(2))
        for name in first:
            assert torch.equal(first[name], second[name]), f"{name} differs between two runs, {strategy}"
    return f"same bytes twice, {' and '.join(ctx.strategies())}"


def check_autograd(ctx: Ctx) -> str:
    """The public operator, gradients against the reference backend on the same seed."""
    from fastpeft.ops import lora_linear

    t = _operands(ctx, *((6, 32, 24, 4) if ctx.tiny else (512, 1024, 768, 16)), ctx.dtype)
    results = []
    for backend in ("triton", "eager"):
        leaves = [t[n].clone().requires_grad_() for n in ("x", "a", "b")]
        torch.manual_seed(5)
        y = lora_linear(leaves[0], t["w"], leaves[1], leaves[2], t["bias"], scale=SCALE, dropout=0.1, backend=backend)
        results.append((y, *torch.autograd.grad(y, leaves, t["dy"])))
    for ours, peer in zip(*results, strict=True):
        gap = error(ours, peer) / peer.abs().max().item()
        assert gap < 0.02, f"triton and eager differ by {gap:.3g} of the largest value"
    return "forward and gradients agree with the reference backend on one seed"


def check_peft(ctx: Ctx) -> str:
    """A small Llama with PEFT adapters: accelerated, its loss and gradients stay; restored, it is PEFT's again."""
    try:
        from peft import LoraConfig, get_peft_model
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as missing:
        return f"left out: {missing}"
    import fastpeft

    width = 32 if ctx.tiny else 256
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=128, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = LlamaForCausalLM(config).to(ctx.device, torch.float32 if ctx.tiny else torch.bfloat16)
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=targets, init_lora_weights=False))
    tokens = torch.randint(0, 128, (2, 16 if ctx.tiny else 128), device=ctx.device)

    def step() -> tuple[float, Tensor]:
        model.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        return loss.item(), torch.cat([p.grad.float().flatten() for p in model.parameters() if p.requires_grad])

    before, grad = step()
    report = fastpeft.accelerate(model)
    loss, ours = step()
    assert abs(loss - before) < 0.02 * abs(before), f"loss {loss} accelerated, {before} by PEFT"
    cosine = float(torch.cosine_similarity(grad, ours, dim=0))
    assert cosine > 0.99, f"gradients have cosine {cosine}"
    fastpeft.restore(model)
    assert abs(step()[0] - before) < 1e-3 * abs(before), "restore did not give PEFT's forward back"
    return f"loss {loss:.4f} (PEFT {before:.4f}), gradient cosine {cosine:.5f}, {len(report.accelerated)} layers"


# Split so that workers share the compiling, which is nearly all of the time: gpu/budget.py has the figures. The
# longest first, and before these what no one has run on a GPU.
CHECKS: dict[str, Callable[[Ctx], str]] = {
    **fourbit.CHECKS,
    "shapes bf16": partial(check_shapes, dtype=torch.bfloat16),
    "shapes fp16": partial(check_shapes, dtype=torch.float16),
    "ranks 16-64": partial(check_ranks, ranks=(16, 24, 32, 64)),
    "shapes fp32": partial(check_shapes, dtype=torch.float32),
    "ranks 100-256": partial(check_ranks, ranks=(100, 128, 256)),
    "ranks 1-8": partial(check_ranks, ranks=(1, 2, 3, 8)),
    "PEFT": check_peft,
    **compiled.CHECKS,
    "dropout bits": check_dropout_bits,
    "autograd": check_autograd,
    "deterministic": check_deterministic,
    **primitives.CHECKS,
    **twins.CHECKS,
}


def run_check(ctx: Ctx, name: str) -> tuple[bool, str]:
    """(passed, detail with its seconds)."""
    started = time.monotonic()
    try:
        passed, detail = True, CHECKS[name](ctx)
    except Exception as error:  # a check that raises has failed: its row says why
        lines = str(error).strip().splitlines() or [""]
        passed, detail = False, f"{type(error).__name__}: {lines[0][:300]}"
    return passed, f"{detail} ({time.monotonic() - started:.0f} s)"


def _share_cores(threads: int) -> None:
    torch.set_num_threads(threads)


def run_checks(ctx: Ctx, budget_s: float) -> Iterator[tuple[str, bool, str]]:
    """(name, passed, detail) of every check; one that fails, crashes or hangs does not stop the others.

    On a GPU up to WORKERS processes at a time. A check not done within the budget is a failure; what it compiled is
    cached.
    """
    if ctx.device == "cpu":
        yield from ((name, *run_check(ctx, name)) for name in CHECKS)
        return
    deadline = time.monotonic() + budget_s
    cores = os.cpu_count() or 1
    workers = min(WORKERS, cores)
    context = multiprocessing.get_context("spawn")
    # A process for each check: one that takes the CUDA context with it fails alone.
    with context.Pool(workers, _share_cores, (max(1, cores // workers),), maxtasksperchild=1) as pool:
        pending = {name: pool.apply_async(run_check, (ctx, name)) for name in CHECKS}
        while pending and time.monotonic() < deadline:
            ready = [name for name, result in pending.items() if result.ready()]
            for name in ready:
                yield name, *pending.pop(name).get()
            if not ready:
                time.sleep(0.1)
        for name in pending:
            yield name, False, "crashed or out of time; compiled kernels are cached: another run gets further"
