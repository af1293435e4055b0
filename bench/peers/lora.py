"""The implementations a LoRA linear is compared with, on the same tensors: a function per peer, or why it is absent."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SCALE = 2.0  # alpha = 2 r, the field's habit


@dataclass(frozen=True)
class Case:
    """One LoRA linear: x [M, K] and w [N, K] in `dtype`, fp32 adapters of rank R."""

    dtype: str
    M: int
    K: int
    N: int
    R: int
    compile: bool = True  # on a CPU a compile takes tens of seconds: one shape a dtype is enough

    @property
    def name(self) -> str:
        return f"{self.dtype} M={self.M} {self.K}->{self.N} r={self.R}"

    @property
    def flop(self) -> dict[str, int]:
        """Forward and backward of the frozen linear (with dX), and of the LoRA linear (dX, dA, dB)."""
        frozen = 4 * self.M * self.N * self.K
        return {"frozen": frozen, "lora": frozen + 6 * self.M * self.R * (self.K + self.N)}


@dataclass
class Peer:
    """`forward(x)` and the tensors whose gradients a training step asks for."""

    forward: Callable[[Tensor], Tensor]
    x: Tensor
    dy: Tensor
    params: tuple[Tensor, ...] = ()
    weight: Tensor | None = None  # of the frozen linear, for the others to share

    def step(self) -> None:
        torch.autograd.grad(self.forward(self.x), (self.x, *self.params), self.dy)

    def infer(self) -> None:
        with torch.no_grad():
            self.forward(self.x)


def frozen(case: Case, device: str) -> Peer:
    """y = x Wᵀ of a frozen W: what LoRA is measured against. Also the tensors the other peers share."""
    gen = torch.Generator(device=device).manual_seed(0)
    dtype = DTYPES[case.dtype]

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=gen, device=device) * std).to(dtype)

    w = normal(case.N, case.K, std=case.K**-0.5)
    x, dy = normal(case.M, case.K).requires_grad_(), normal(case.M, case.N)
    return Peer(lambda x: F.linear(x, w), x, dy, weight=w)


def adapters(case: Case, device: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    gen = torch.Generator(device=device).manual_seed(1)
    a = torch.randn((case.R, case.K), generator=gen, device=device) * case.K**-0.5
    b = torch.randn((case.N, case.R), generator=gen, device=device) * 0.02
    return a.to(dtype).requires_grad_(), b.to(dtype).requires_grad_()


def eager_formula(w: Tensor, a: Tensor, b: Tensor, p: float) -> Callable[[Tensor], Tensor]:
    """LoRA written out in torch; adapters are cast down to x's dtype (they are small), x never up."""

    def forward(x: Tensor) -> Tensor:
        s = F.linear(F.dropout(x, p) if p else x, a.to(x.dtype))
        return F.linear(x, w) + F.linear(s, b.to(x.dtype)) * SCALE

    return forward


def _like(base: Peer, forward: Callable[[Tensor], Tensor], *params: Tensor) -> Peer:
    return replace(base, forward=forward, params=params)


def eager(case: Case, device: str, base: Peer, p: float) -> Peer:
    a, b = adapters(case, device)
    return _like(base, eager_formula(base.weight, a, b, p), a, b)


def compiled(case: Case, device: str, base: Peer, p: float) -> Peer:
    if device == "cpu" and not any(shutil.which(c) for c in ("g++", "clang++", "c++")):
        raise RuntimeError("no C++ compiler for torch.compile's CPU code")
    a, b = adapters(case, device)
    peer = _like(base, torch.compile(eager_formula(base.weight, a, b, p), dynamic=False), a, b)
    peer.step()
    return peer


class _Holder(torch.nn.Module):
    def __init__(self, w: Tensor):
        super().__init__()
        self.linear = torch.nn.Linear(w.shape[1], w.shape[0], bias=False, device="meta")
        self.linear.weight = torch.nn.Parameter(w, requires_grad=False)


def peft_layer(w: Tensor, case: Case, p: float, fp32_adapters: bool) -> torch.nn.Module:
    """PEFT's own lora.Linear around `w`, as get_peft_model makes it; adapters in fp32 (its default) or in w's dtype."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=case.R, lora_alpha=int(SCALE * case.R), lora_dropout=p, target_modules=["linear"],
                        init_lora_weights=False)  # fmt: skip
    return get_peft_model(_Holder(w), config, autocast_adapter_dtype=fp32_adapters).base_model.model.linear


def _peft(case: Case, base: Peer, p: float, fp32_adapters: bool) -> Peer:
    layer = peft_layer(base.weight, case, p, fp32_adapters)
    return _like(base, layer, layer.lora_A["default"].weight, layer.lora_B["default"].weight)


def peft(case: Case, device: str, base: Peer, p: float) -> Peer:
    return _peft(case, base, p, True)


def peft_base_dtype(case: Case, device: str, base: Peer, p: float) -> Peer:
    return _peft(case, base, p, False)


def ours(case: Case, device: str, base: Peer, p: float) -> Peer:
    from fastpeft.ops import lora_linear

    a, b = adapters(case, device)
    w = base.weight
    return _like(base, lambda x: lora_linear(x, w, a, b, scale=SCALE, dropout=p), a, b)


def ours_layer(w: Tensor, case: Case, p: float) -> torch.nn.Module:
    """fastpeft's LoRALinear around `w`."""
    from fastpeft import LoRALinear

    layer = LoRALinear.from_linear(_Holder(w).linear, rank=case.R, alpha=SCALE * case.R, dropout=p)
    with torch.no_grad():
        layer.lora_B.normal_(std=0.02)
    return layer


def ours_module(case: Case, device: str, base: Peer, p: float) -> Peer:
    layer = ours_layer(base.weight, case, p)
    return _like(base, layer, *(t for t in layer.parameters() if t.requires_grad))


def lorafusion(case: Case, device: str, base: Peer, p: float) -> Peer:
    from lorafusion.ops.lora_v1 import fused_linear_lora

    a, b = adapters(case, device, base.weight.dtype)  # it takes no other dtype than x's
    w = base.weight
    peer = _like(base, lambda x: fused_linear_lora(x[None], w, a, b, SCALE, dropout_p=p)[0], a, b)
    peer.step()
    return peer


def unsloth(case: Case, device: str, base: Peer, p: float) -> Peer:
    if p:
        raise RuntimeError("its kernel has no dropout")
    from unsloth.kernels.fast_lora import LoRA_W

    a, b = adapters(case, device, base.weight.dtype)
    w = base.weight
    peer = _like(base, lambda x: LoRA_W.apply(x[None], w, None, a, b, SCALE)[0], a, b)
    peer.step()
    return peer


# Order matters for one reason: importing unsloth patches peft and transformers, so it is built last.
PEERS = {
    "eager": eager, "PEFT": peft, "PEFT base dtype": peft_base_dtype, "torch.compile": compiled, "ours": ours,
    "LoRAFusion": lorafusion, "Unsloth": unsloth,
}  # fmt: skip
OPTIONAL = {"PEFT", "PEFT base dtype", "torch.compile", "LoRAFusion", "Unsloth"}
CUDA_ONLY = {"LoRAFusion", "Unsloth"}


def build(case: Case, device: str, dropouts: tuple[float, ...], without: dict[str, str] | None = None):
    """(peers by name, reasons by name): "frozen", then every peer at every dropout. Our own failures raise.

    without: peers to leave out, each with the reason that the results then state.
    """
    base = frozen(case, device)
    without = without or {}
    peers, absent = {"frozen": base}, dict(without)
    if case.dtype == "bf16" and device == "cpu":  # the fair floor where torch has no native bf16 GEMM
        peers["frozen fp32"] = frozen(replace(case, dtype="fp32"), device)
    torch._dynamo.reset()  # cases must not run into each other's recompile limit
    for name, make in PEERS.items():
        if name in without or (name in CUDA_ONLY and device != "cuda"):
            continue
        if name == "torch.compile" and not case.compile:
            absent[name] = "left out of this case for the time its compile takes"
            continue
        for p in dropouts:
            try:
                peers[f"{name} p={p:g}"] = make(case, device, base, p)
            except Exception as error:  # a peer that may be missing: the table says why it is
                if name not in OPTIONAL:
                    raise
                message = (str(error).strip().splitlines() or [""])[0]
                absent[f"{name} p={p:g}"] = f"{type(error).__name__}: {message[:160]}"
    return peers, absent
