"""What a 4-bit weight's operators are compared with, on the same tensors: a function per kind of case."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.timing import with_pages_kept
from fastpeft import QLoRALinear, ops
from peers.lora import SCALE, adapters, ours_layer, peft_layer

DTYPE = torch.bfloat16
KEPT = "dequantise, pages kept,"  # in a case of its own, the last: see with_pages_kept
LOOP = "forward in a loop,"  # the same call again and again: its weight stays in the last cache
KINDS = {
    "dequantise": "to bf16", "quantise": "from bf16, double", "forward": "training mode", LOOP: "training mode",
    "step": "forward + backward of x, A, B", KEPT: "to bf16, no page faults",
}  # fmt: skip
BASES = {
    "dequantise": "memcpy", "quantise": "bitsandbytes", "forward": "bf16 F.linear", LOOP: "bf16 F.linear",
    "step": "ours over bf16",
    KEPT: "memcpy",
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One operator on w [N, K] in bf16 or NF4 (blocks of 64, double quantisation); x [M, K] in bf16, fp32 adapters."""

    kind: str
    M: int
    N: int
    K: int
    R: int = 16
    dtype: str = "bf16"

    @property
    def name(self) -> str:
        rows = f" M={self.M} r={self.R}" if self.M else ""
        return f"{self.kind} nf4 {self.K}->{self.N}{rows}"

    @property
    def calls(self) -> int:
        """Of a peer in a row that make one sample."""
        return 20 if self.kind == LOOP else 1

    def least_seconds(self, roof: dict, packed: int | None, adapted: bool) -> float:
        """The time of the arithmetic or of the bytes, whichever is longer, at the measured roofs.

        packed: bytes of the 4-bit weight; None where the peer reads the weight in bf16.
        """
        M, N, K = self.M, self.N, self.K
        weight, whole = packed or 2 * N * K, 2 * N * K
        if not M:
            return (weight + whole) / roof["copy_bytes_per_s"]
        passes = 2 if self.kind == "step" else 1
        flop = passes * 2 * M * N * K + (2 * passes - 1) * 2 * M * self.R * (K + N) * adapted
        moved = passes * (weight + 2 * M * (N + K))
        return max(flop / roof["gemm_bf16_flop_per_s"], moved / roof["copy_bytes_per_s"])


@dataclass
class Peer:
    """`call` is what is timed; `forward`, of a product in training mode, and `own` are for the bytes it keeps.

    four_bit, adapted: what it reads and computes. against: the peer that does the same, to say how much faster it is.
    """

    call: Callable[[], object]
    forward: Callable[[], Tensor] | None = None
    own: Iterable[Tensor] = ()
    four_bit: bool = True
    adapted: bool = True
    against: str | None = None


@dataclass
class Field:
    """The peers of a case by name, why others are absent, and how far results are from one another (relative norm)."""

    peers: dict[str, Peer] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    agreement: dict[str, float | str] = field(default_factory=dict)
    packed_bytes: int = 0  # of the weight in 4 bits, its scales included


class Operands:
    """The tensors that the peers of a case share. `bnb` is bitsandbytes, or None with the reason in `missing`."""

    def __init__(self, case: Case):
        gen = torch.Generator().manual_seed(0)
        self.case = case
        self.w = (torch.randn(case.N, case.K, generator=gen) * case.K**-0.5).to(DTYPE)
        self.x = torch.randn(case.M, case.K, generator=gen).to(DTYPE).requires_grad_()
        self.dy = torch.randn(case.M, case.N, generator=gen).to(DTYPE)
        self.quantized = ops.quantize_4bit(self.w)
        self.missing = ""
        try:
            import bitsandbytes

            self.bnb: Any = bitsandbytes
        except Exception as error:  # its native library may fail to load in ways of its own
            self.bnb, self.missing = None, f"{type(error).__name__}: {str(error)[:160]}"

    def bnb_linear(self) -> nn.Module:
        """bitsandbytes' own frozen layer, its weight quantised by itself."""
        layer = self.bnb.nn.Linear4bit(
            self.case.K, self.case.N, bias=False, compute_dtype=DTYPE, compress_statistics=True, quant_type="nf4"
        )
        layer.weight = self.bnb.nn.Params4bit(self.w, requires_grad=False, compress_statistics=True, quant_type="nf4")
        return layer.to("cpu")

    def adapt(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Gives a layer's adapter the values that every layer of the case has."""
        for parameter, value in zip((a, b), adapters(self.case, "cpu"), strict=True):
            parameter.data.copy_(value.detach())
        return a, b


def build(case: Case) -> Field:
    """Every peer of the case; before that, results must be those of bitsandbytes. Our own failures raise."""
    shared = Operands(case)
    out = {"dequantise": _dequantise, KEPT: _dequantise, "quantise": _quantise}.get(case.kind, _products)(shared)
    out.packed_bytes = shared.quantized.nbytes
    if shared.missing:
        out.absent["bitsandbytes"] = shared.missing
        if case.kind in ("forward", LOOP, "step"):
            out.absent["PEFT over bitsandbytes"] = "bitsandbytes is absent"
    return out


def require_equal(what: str, ours: Tensor, theirs: Tensor) -> None:
    """Raises AssertionError unless the bytes are the same."""
    same = ours.dtype == theirs.dtype and ours.numel() == theirs.numel()
    if not (same and torch.equal(ours.reshape(-1).view(torch.uint8), theirs.reshape(-1).view(torch.uint8))):
        raise AssertionError(f"linear4bit: {what} must equal bitsandbytes' to the bit, got other bytes")


def _dequantise(shared: Operands) -> Field:
    q, field = shared.quantized, Field()
    moved = q.nbytes + shared.w.nbytes
    source = torch.zeros(moved // 2, dtype=torch.uint8)
    copy, out, stored = torch.zeros_like(source), torch.empty_like(shared.w), torch.zeros_like(shared.w)
    field.peers["memcpy"] = Peer(lambda: copy.copy_(source))
    # No dequantisation is faster than the stores of what it gives, whatever it costs to find the values.
    field.peers["memset of the output"] = Peer(lambda: stored.zero_())
    calls: dict[str, Callable[[], object]] = {}
    if shared.bnb:
        data, state = q.to_quant_state()
        calls["bitsandbytes"] = lambda: shared.bnb.functional.dequantize_4bit(data, state)
        require_equal("dequantize_4bit", ops.dequantize_4bit(q), calls["bitsandbytes"]())
        field.agreement["dequantised"] = "equal bits"
    calls["ours"] = lambda: ops.dequantize_4bit(q)
    calls["ours, out="] = lambda: ops.dequantize_4bit(q, out=out)
    for name, call in calls.items():
        against = "bitsandbytes" if name.startswith("ours") else None
        field.peers[name] = Peer(with_pages_kept(call) if shared.case.kind == KEPT else call, against=against)
    return field


def _quantise(shared: Operands) -> Field:
    w, field = shared.w, Field()
    if shared.bnb:
        functional = shared.bnb.functional

        def theirs() -> Any:
            return functional.quantize_4bit(w, blocksize=64, compress_statistics=True, quant_type="nf4")

        data, state = theirs()
        found = ops.Weight4bit.from_quant_state(data, state)
        for name, mine, other in zip(
            ("packed", "codes", "code", "scale", "offset"),
            (shared.quantized.packed, *shared.quantized.scales), (found.packed, *found.scales), strict=True,
        ):  # fmt: skip
            require_equal(f"{name} of quantize_4bit", mine, other)
        field.agreement["quantised"] = "equal bytes"
        field.peers["bitsandbytes"] = Peer(theirs)
    field.peers["ours"] = Peer(lambda: ops.quantize_4bit(w), against="bitsandbytes")
    return field


def _products(shared: Operands) -> Field:
    case, field, whole = shared.case, Field(), shared.case.kind == "step"
    x, dy, q, w = shared.x, shared.dy, shared.quantized, shared.w

    def add(name: str, layer: Callable[[Tensor], Tensor], leaves: tuple[Tensor, ...], own: Iterable[Tensor], **kind):
        def forward() -> Tensor:
            return layer(x)

        def step() -> tuple[Tensor, ...]:
            return torch.autograd.grad(forward(), (x, *leaves), dy)

        field.peers[name] = Peer(step if whole else forward, forward, [*own, *leaves], **kind)

    def peft_leaves(layer: Any) -> tuple[Tensor, Tensor]:
        return shared.adapt(layer.lora_A["default"].weight, layer.lora_B["default"].weight)

    ours = _ours(shared)
    if whole:
        dense = ours_layer(w, case, 0.0)
        add("ours over bf16", dense, shared.adapt(dense.lora_A, dense.lora_B), [w], four_bit=False)
        try:
            layer = peft_layer(w, case, 0.0, True)
            add("PEFT over bf16", layer, peft_leaves(layer), [w], four_bit=False)
        except ImportError as error:
            field.absent["PEFT over bf16"] = f"{type(error).__name__}: {error}"
    else:
        add("bf16 F.linear", lambda x: F.linear(x, w), (), [w], four_bit=False, adapted=False)
    if shared.bnb:
        frozen = shared.bnb_linear()
        if not whole:
            add("bitsandbytes, no LoRA", frozen, (), frozen.parameters(), adapted=False)
            _packed_for_inference(shared, field)
        try:
            layer = _peft_over(frozen if whole else shared.bnb_linear(), case)
            add("PEFT over bitsandbytes", layer, peft_leaves(layer), layer.parameters())
            field.agreement |= _agreement(ours, layer, shared)
        except ImportError as error:
            field.absent["PEFT over bitsandbytes"] = f"{type(error).__name__}: {error}"
    held = (q.packed, *q.scales)
    if not whole:
        add("ours, no LoRA", lambda x: ops.linear4bit(x, q), (), held, adapted=False,
            against="bitsandbytes, no LoRA")  # fmt: skip
    own = (*ours.parameters(), *ours.buffers())
    add("ours", ours, (ours.lora_A, ours.lora_B), own, against="PEFT over bitsandbytes")
    return field


def _ours(shared: Operands) -> Any:
    """fastpeft's QLoRALinear on the case's weight: linear4bit_lora, as a model calls it."""
    linear = nn.Linear(shared.case.K, shared.case.N, bias=False, device="meta")
    linear.weight = nn.Parameter(shared.w, requires_grad=False)
    layer = QLoRALinear.from_linear(linear, rank=shared.case.R, alpha=SCALE * shared.case.R, dropout=0.0)
    shared.adapt(layer.lora_A, layer.lora_B)
    return layer


def _peft_over(linear: nn.Module, case: Case) -> Any:
    """PEFT's lora.bnb.Linear4bit around `linear`, as get_peft_model makes it of a model loaded in 4 bits."""
    from peft import LoraConfig, get_peft_model

    holder = nn.Module()
    holder.linear, holder.is_loaded_in_4bit = linear, True
    config = LoraConfig(r=case.R, lora_alpha=int(SCALE * case.R), lora_dropout=0.0, target_modules=["linear"],
                        init_lora_weights=False)  # fmt: skip
    layer = get_peft_model(holder, config).base_model.model.linear
    assert type(layer).__name__ == "Linear4bit" and "peft" in type(layer).__module__, type(layer)
    return layer


def _packed_for_inference(shared: Operands, field: Field) -> None:
    """bitsandbytes' own product for inference, for which it repacks the weight; no gradients, so no LoRA to train."""
    layer, name = shared.bnb_linear().eval(), "bitsandbytes packed, eval"
    x = shared.x.detach()

    def call() -> Tensor:
        with torch.no_grad():
            return layer(x)

    call()
    if getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
        field.peers[name] = Peer(call, adapted=False)
    else:
        field.absent[name] = "it repacks no weight on this processor or in this shape"


def _agreement(ours: Any, theirs: Any, shared: Operands) -> dict[str, float | str]:
    """Relative norm of ours - PEFT's, of y and of each gradient; raises above what two bf16 roundings explain."""
    found = {}
    leaves = ((ours.lora_A, ours.lora_B), (theirs.lora_A["default"].weight, theirs.lora_B["default"].weight))
    results = []
    for layer, (a, b) in zip((ours, theirs), leaves, strict=True):
        y = layer(shared.x)
        results.append((y.detach(), *torch.autograd.grad(y, (shared.x, a, b), shared.dy)))
    for name, mine, other in zip(("y", "dx", "dA", "dB"), *results, strict=True):
        mine, other = mine.float(), other.float()
        found[name] = float((mine - other).norm() / other.norm())
        if not found[name] < 2e-2:
            raise AssertionError(f"linear4bit: {name} must be within 2e-2 of PEFT's, got {found[name]:.2g}")
    return found
