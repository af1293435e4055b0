"""LoRARNN, LoRALSTM, LoRAGRU: torch's recurrent layers over whole sequences with LoRA on every W_ih and W_hh.

The vendor's time loop (cuDNN, oneDNN, ATen) takes weights but no adapters. So each weight is merged once a sequence,
W + scaling · B A, differentiable and in fp32 or wider, and the loop's dense dW goes on through that sum to dA and dB:
2 · gates · hidden · (in + hidden) · r FLOP each way. Dropout on A's input cannot be merged: then x is widened by
drop(x) Aᵀ to [T, N, in + r], and W_ih by scaling · B, which gives the same sum in one product.

For a GRU or RNN on a CPU there is only ATen's loop, one step at a time; ours runs instead, fastpeft/ops/_recurrent.py.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, ClassVar, TypeVar

import torch
from torch import _VF, nn
from torch.nn.utils.rnn import PackedSequence

from fastpeft import dispatch
from fastpeft.nn.layers._parts import LoRAPart, Parts, Site
from fastpeft.ops import _calls, _checks, _derivatives, lora_adapter
from fastpeft.ops._recurrent import recurrent

_Self = TypeVar("_Self", bound="_Sequence")
_LOOPS: dict[str, Any] = {"LSTM": _VF.lstm, "GRU": _VF.gru, "RNN_TANH": _VF.rnn_tanh, "RNN_RELU": _VF.rnn_relu}


class _Sequence(Parts):
    """The common base of the three layers. The annotated attributes are nn.RNNBase's."""

    NAMES: ClassVar[tuple[str, ...]] = (
        "num_layers", "bias", "batch_first", "dropout", "bidirectional", "proj_size", "device", "dtype"
    )  # fmt: skip

    mode: str
    num_layers: int
    hidden_size: int
    proj_size: int
    batch_first: bool
    bidirectional: bool
    dropout: float
    _all_weights: list[list[str]]

    @classmethod
    def from_rnn(
        cls: type[_Self],
        rnn: nn.RNNBase,
        rank: int | None = None,
        alpha: float | None = None,
        dropout: float | None = None,
        **options: Any,
    ) -> _Self:
        """Adapt ``rnn``: rank 16, alpha 32 (unless ``scaling`` is given), dropout 0.05, and the class's options."""
        return cls._adapting(rnn, rank, alpha, dropout, options)

    @classmethod
    def _sites(cls, layer: Any) -> dict[str, Site]:
        names = [name.removeprefix("weight_") for names in layer._all_weights for name in names]
        return {f"lora_{name}": Site(f"weight_{name}", f"bias_{name}") for name in names if name[:2] in ("ih", "hh")}

    def to_rnn(self) -> Any:
        """A new layer of torch's class that computes what this one computes in eval mode, with its own weights."""
        plain = self._to_torch("to_rnn")
        plain._init_flat_weights()
        return plain

    def forward(self, input: Any, hx: Any = None) -> Any:
        if not any(part.active for part in self._adapters()):
            return self.TORCH.forward(self, input, hx)
        packed = isinstance(input, PackedSequence)
        x, sizes, order, back = input if packed else (input, None, None, None)
        op, base = type(self).__name__, getattr(self, self._all_weights[0][0])
        _checks.activation(op, x)
        _checks.require(packed or x.dim() in (2, 3), op, "input", "have 2 or 3 dimensions", x.dim())
        batched, dim = packed or x.dim() == 3, 0 if self.batch_first else 1
        x = x if batched else x.unsqueeze(dim)
        _checks.require(x.shape[0 if packed else 1 - dim] > 0, op, "input", "have at least one step", list(x.shape))
        hidden = self._hidden(x, hx, sizes, batched)
        held: Any = self
        held.check_forward_args(x, tuple(hidden) if self.mode == "LSTM" else hidden[0], sizes)
        cast = _calls.autocast_dtype(x, x.device.type)
        kind = torch.promote_types(torch.promote_types(x.dtype, base.dtype), torch.float32)
        for part in self._adapters():
            if part.active and part.backend is not None:  # the vendor's loop does not check it
                dispatch.select("lora_shrink", part.backend, x.device.type, kind, op)
        if order is not None:
            hidden = [h.index_select(1, order) for h in hidden]
        # A weight merged in a half precision would lose most of the update, so the loop runs in fp32 there.
        with torch.autocast(x.device.type, enabled=False) if cast else nullcontext():
            y, hidden = self._run(x.to(kind), [h.to(kind) for h in hidden], sizes)
        given = cast or x.dtype
        y, hidden = y.to(given), [(h if back is None else h.index_select(1, back)).to(given) for h in hidden]
        if not batched:
            y, hidden = y.squeeze(dim), [h.squeeze(1) for h in hidden]
        out = PackedSequence(y, sizes, order, back) if packed else y
        return out, tuple(hidden) if self.mode == "LSTM" else hidden[0]

    def _adapters(self) -> list[LoRAPart]:
        return [part for part in self._modules.values() if isinstance(part, LoRAPart)]

    def _hidden(self, x: torch.Tensor, hx: Any, sizes: Any, batched: bool) -> list[torch.Tensor]:
        """[h] or [h, c], each [layers · directions, N, size]; zeros if ``hx`` is None."""
        op, lstm = type(self).__name__, self.mode == "LSTM"
        if hx is None:
            N = int(sizes[0]) if sizes is not None else x.shape[0 if self.batch_first else 1]
            widths = [self.proj_size or self.hidden_size, self.hidden_size][: 1 + lstm]
            return [x.new_zeros(len(self._all_weights), N, width) for width in widths]
        if lstm:
            pair = isinstance(hx, (tuple, list)) and len(hx) == 2
            _checks.require_dtype(pair, op, "hx", "be a pair (h, c)", type(hx).__name__)
        found = list(hx) if lstm else [hx]
        for h in found:
            _checks.dense(op, "hx", h)
            rule = "have 3 dimensions for a batched input, 2 for an unbatched one"
            _checks.require(h.dim() == 2 + batched, op, "hx", rule, h.dim())
        return found if batched else [h.unsqueeze(1) for h in found]

    def _run(self, x: torch.Tensor, hidden: list[torch.Tensor], sizes: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The output and the last states in the dtype of x; all layers in one call unless A's input has dropout."""
        if self._steps_here(x, sizes):
            return self._steps(x, hidden[0])
        # torch.compile cannot train oneDNN's LSTM, which runs unless x requires a gradient; the widened x does.
        if not torch.compiler.is_compiling() and not any(self._drops(part) for part in self._adapters()):
            weights = [weight for names in self._all_weights for weight in self._weights(names, x.dtype)]
            return self._loop(x, hidden, sizes, weights, self.num_layers)
        D, last = 1 + self.bidirectional, []
        for layer in range(self.num_layers):
            if layer:
                x = nn.functional.dropout(x, self.dropout, self.training)
            here = slice(layer * D, layer * D + D)
            x, weights = self._widened(x, self._all_weights[here])
            x, states = self._loop(x, [h[here] for h in hidden], sizes, weights, 1)
            last.append(states)
        return x, [torch.cat(states) for states in zip(*last, strict=True)]

    def _steps_here(self, x: torch.Tensor, sizes: Any) -> bool:
        """Whether our own loop runs: if ATen's would go step by step too, and nothing traces or transforms it."""
        traced = torch.compiler.is_compiling() or _derivatives.composed(type(self).__name__, None, False)
        return self.mode != "LSTM" and x.device.type == "cpu" and sizes is None and not traced

    def _steps(self, x: torch.Tensor, hidden: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """`_run` by our own loop: one lora_linear for all steps, and thin gradients of W_hh."""
        x, D = x.transpose(0, 1) if self.batch_first else x, 1 + self.bidirectional
        last: list[torch.Tensor] = []
        for layer in range(self.num_layers):
            if layer:
                x = nn.functional.dropout(x, self.dropout, self.training)
            found = []
            for direction, names in enumerate(self._all_weights[layer * D : layer * D + D]):
                ih, hh = self._pair_of(names)
                gates = ih.product(x, *ih.base(x.dtype))
                weight, bias = hh.base(x.dtype)
                a, b, more = hh.update(x.dtype)
                bias = weight.new_zeros(len(weight)) if bias is None else bias
                bias = bias if more is None else bias + more
                y = recurrent(gates.flip(0) if direction else gates, hidden[len(last)], weight, bias, a, b, self.mode)
                last.append(y[-1])
                found.append(y.flip(0) if direction else y)
            x = torch.cat(found, -1) if direction else found[0]
        return x.transpose(0, 1) if self.batch_first else x, [torch.stack(last)]

    def _pair_of(self, names: list[str]) -> tuple[LoRAPart, LoRAPart]:
        """The adapters of W_ih and W_hh, by the names of one layer's weights in one direction."""
        ih, hh = (self._modules[name.replace("weight", "lora")] for name in names[:2])
        assert isinstance(ih, LoRAPart) and isinstance(hh, LoRAPart)
        return ih, hh

    def _drops(self, part: LoRAPart) -> bool:
        return part.active and part.training and part.dropout_probability > 0 and "weight_ih" in part.site.weight

    def _loop(
        self, x: torch.Tensor, hidden: list[torch.Tensor], sizes: Any, weights: list[torch.Tensor], layers: int
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The vendor's loop over ``layers`` layers; ``sizes`` are the batch sizes of a packed x."""
        state = tuple(hidden) if self.mode == "LSTM" else hidden[0]
        biases = len(weights) // (layers * (1 + self.bidirectional)) >= 4
        dropout = self.dropout if layers > 1 else 0.0
        options = (weights, biases, layers, dropout, self.training, self.bidirectional)
        loop = _LOOPS[self.mode]
        y, *last = loop(x, state, *options, self.batch_first) if sizes is None else loop(x, sizes, state, *options)
        return y, last

    def _weights(self, names: list[str], dtype: torch.dtype) -> list[torch.Tensor]:
        """One layer's weights and biases in one direction, with their updates; a missing bias is zero."""
        (w_ih, b_ih), (w_hh, b_hh) = (part.effective(dtype) for part in self._pair_of(names))
        found = [w_ih, w_hh]
        if b_ih is not None or b_hh is not None:
            found += [w_ih.new_zeros(w_ih.shape[0]) if bias is None else bias for bias in (b_ih, b_hh)]
        return found + [getattr(self, name).to(dtype) for name in names if "_hr" in name]

    def _widened(self, x: torch.Tensor, layer: list[list[str]]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """[x, drop(x) Aᵀ of each direction], and one layer's weights with [W_ih, scaling · B] instead of W_ih.

        Each direction reads its own columns and has zeros for the other's.
        """
        found: list[list[torch.Tensor]] = []
        shrunk: list[torch.Tensor] = []
        columns: list[torch.Tensor | None] = []
        for names in layer:
            weights, part = self._weights(names, x.dtype), self._pair_of(names)[0]
            columns.append(None)
            if part.active:
                a, columns[-1], _ = part.update(x.dtype)
                weights[0] = part.base(x.dtype)[0]
                one, p = torch.eye(part.rank, device=x.device, dtype=x.dtype), part.dropout_probability
                shrunk.append(lora_adapter(x, a, one, dropout=p if part.training else 0.0, backend=part.backend))
            found.append(weights)
        for own, weights in enumerate(found):
            wide = [c if i == own else torch.zeros_like(c) for i, c in enumerate(columns) if c is not None]
            weights[0] = torch.cat([weights[0], *wide], 1)
        return torch.cat([x, *shrunk], -1), [weight for weights in found for weight in weights]


class LoRARNN(_Sequence, nn.RNN):
    """nn.RNN with LoRA on W_ih and W_hh of every layer and direction                  A [r, in], B [gates · hidden, r]

    Hu et al. 2021, arXiv:2106.09685, eq. 3, for each weight

    LoRARNN(original_layer, rank=8, alpha=16, dropout_probability=0.1, bias=False)      layout "out_in"
        adapts an nn.RNN: its Parameters become this module's own and are frozen. Its training flag is kept.
    LoRARNN(input_size, hidden_size, rank=4, num_layers=1, bias=True, ...)              layout "in_out"
        makes a new frozen layer first; num_layers, bias, batch_first, dropout, bidirectional, nonlinearity, device and
        dtype are torch's there.

    lora_bias, lora_dropout    LoRA's own, where ``bias`` and ``dropout`` are torch's. lora_dropout hides elements of
                each layer's input from A of W_ih; the update of W_hh is merged once a sequence and has none
    rank, alpha, layout, scaling, use_rslora, init, backend, adapter_dtype, freeze_base    as in LoRALinear
    Input      x [T, N, in], [N, T, in] with batch_first, [T, in], or a PackedSequence; hx as in torch, or None
    Output     as torch's, in x.dtype, under autocast in its dtype; bit-identical to the base while disabled. The time
               loop runs in fp32 for half precisions, in which a merged weight would lose most of its update.
    Saves      what the vendor's loop saves, and one copy of each weight in the dtype of the loop
    State dict the keys of nn.RNN, whose checkpoints load with strict=False; lora_ih_l0.lora_A and, say,
               lora_hh_l0_reverse.lora_B. It is always that of the unmerged module.
    Raises     TypeError: original_layer is no plain layer of torch, a type, or an unknown option.  ValueError: a range,
               or a layer with hooks; nothing has been changed then.  RuntimeError, ValueError: shapes, as torch.

    torch.compile traces it under ``torch._dynamo.config.allow_rnn``, as it does torch's. On CUDA the loop is cuDNN's,
    which copies the weights into one buffer at each call, warns once, and rounds them to TF32 if torch allows it.
    """

    TORCH = nn.RNN
    NAMES = (*_Sequence.NAMES, "nonlinearity")


class LoRALSTM(_Sequence, nn.LSTM):
    """nn.LSTM with LoRA on W_ih and W_hh of every layer and direction, all four gates in one: B [4 · hidden_size, r].

    As LoRARNN, over an nn.LSTM; ``proj_size`` too, whose W_hr has no adapter.
    """

    TORCH = nn.LSTM


class LoRAGRU(_Sequence, nn.GRU):
    """nn.GRU with LoRA on W_ih and W_hh of every layer and direction, all three gates in one: B [3 · hidden_size, r].

    As LoRARNN, over an nn.GRU.
    """

    TORCH = nn.GRU
