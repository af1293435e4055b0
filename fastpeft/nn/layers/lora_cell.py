"""LoRARNNCell, LoRALSTMCell, LoRAGRUCell: torch's recurrent cells with LoRA on their two weights."""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar

import torch
from torch import nn

from fastpeft.nn.layers._parts import LoRAPart, Parts, Site
from fastpeft.ops import _checks

_Self = TypeVar("_Self", bound="_Cell")


class _Cell(Parts):
    """The common base of the three cells."""

    NAMES: ClassVar[tuple[str, ...]] = ("bias", "device", "dtype")

    lora_ih: LoRAPart
    lora_hh: LoRAPart

    @classmethod
    def from_cell(
        cls: type[_Self],
        cell: nn.RNNCellBase,
        rank: int | None = None,
        alpha: float | None = None,
        dropout: float | None = None,
        **options: Any,
    ) -> _Self:
        """Adapt ``cell``: rank 16, alpha 32 (unless ``scaling`` is given), dropout 0.05, and the class's options."""
        return cls._adapting(cell, rank, alpha, dropout, options)

    @classmethod
    def _sites(cls, layer: Any) -> dict[str, Site]:
        return {f"lora_{name}": Site(f"weight_{name}", f"bias_{name}") for name in ("ih", "hh")}

    def to_cell(self) -> Any:
        """A new cell of torch's class that computes what this one computes in eval mode, with its own weights."""
        return self._to_torch("to_cell")

    def _plain(self) -> bool:
        return not (self.lora_ih.active or self.lora_hh.active)

    def _states(self, x: torch.Tensor, *given: torch.Tensor | None) -> list[torch.Tensor]:
        """x and the states, all [N, size]; a state that is not given is zero."""
        op = type(self).__name__
        _checks.activation(op, x)
        _checks.require(x.dim() in (1, 2), op, "input", "have 1 or 2 dimensions", x.dim())
        held: Any = self
        sizes = [held.input_size, *[held.hidden_size] * len(given)]
        found = [x]
        for state in given:
            if state is None:
                state = x.new_zeros(*x.shape[:-1], held.hidden_size)
            found.append(state)
        for name, size, tensor in zip(("input", "hx", "cx"), sizes, found, strict=False):
            _checks.dense(op, name, tensor)
            shape = [*x.shape[:-1], size]
            _checks.require(list(tensor.shape) == shape, op, name, f"have shape {shape}", list(tensor.shape))
        return [tensor.unsqueeze(0) if x.dim() == 1 else tensor for tensor in found]

    def _gates(self, x: torch.Tensor, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x W_ihᵀ + b_ih and h W_hhᵀ + b_hh [N, gates · hidden_size], each with its update."""
        held: Any = self
        return (
            self.lora_ih.product(x, held.weight_ih, held.bias_ih),
            self.lora_hh.product(h, held.weight_hh, held.bias_hh),
        )


class LoRARNNCell(_Cell, nn.RNNCell):
    """h' = act(x W_ihᵀ + b_ih + h W_hhᵀ + b_hh + Δ_ih(x) + Δ_hh(h)), Δ(x) = scaling · (dropout(x) Aᵀ Bᵀ + lora_bias)

    Δ is that of Hu et al. 2021, arXiv:2106.09685, eq. 3

    LoRARNNCell(original_layer, rank=8, alpha=16, dropout_probability=0.1, bias=False)      layout "out_in"
        adapts an nn.RNNCell: its Parameters become this module's own and are frozen. Its training flag is kept.
    LoRARNNCell(input_size, hidden_size, rank=4, bias=True, nonlinearity="tanh")            layout "in_out"
        makes a new frozen cell first; ``bias``, ``nonlinearity``, ``device``, ``dtype`` are torch's there.

    lora_bias, lora_dropout    LoRA's own bias and dropout, where ``bias`` and ``dropout`` are torch's; the dropout acts
                on x and on h alike
    rank, alpha, layout, scaling, use_rslora, init, backend, adapter_dtype, freeze_base    as in LoRALinear
    Input      x [N, input_size] or [input_size]; h [N, hidden_size] or [hidden_size], zero if not given
    Output     h' in the shape of h; act is tanh or relu, applied once; bit-identical to the cell while disabled
    State dict weight_ih, weight_hh, bias_ih, bias_hh as in nn.RNNCell, whose checkpoints load with strict=False;
               lora_ih.lora_A, lora_ih.lora_B, lora_hh.… It is always that of the unmerged module.
    Raises     TypeError: original_layer is no plain cell of torch, a type, or an unknown option.  ValueError: a range,
               a shape, or a cell with hooks.  Nothing has been changed then.
    """

    TORCH = nn.RNNCell
    NAMES = (*_Cell.NAMES, "nonlinearity")

    def forward(self, input: torch.Tensor, hx: torch.Tensor | None = None) -> torch.Tensor:
        if self._plain():
            return nn.RNNCell.forward(self, input, hx)
        x, h = self._states(input, hx)
        i, g = self._gates(x, h)
        out = torch.tanh(i + g) if self.nonlinearity == "tanh" else torch.relu(i + g)
        return out.squeeze(0) if input.dim() == 1 else out


class LoRALSTMCell(_Cell, nn.LSTMCell):
    """nn.LSTMCell with LoRA on W_ih and W_hh, all four gates in one: A [r, in], B [4 · hidden_size, r].

    Construction, options, state dict and errors are those of LoRARNNCell, over an nn.LSTMCell.
    Input      x [N, input_size] or [input_size]; (h, c) each [N, hidden_size] or [hidden_size], zero if not given
    Output     (h', c') in the shapes of h and c
    """

    TORCH = nn.LSTMCell

    def forward(
        self, input: torch.Tensor, hx: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self._plain():
            return nn.LSTMCell.forward(self, input, hx)
        x, h, c = self._states(input, *((None, None) if hx is None else hx))
        gates = self._gates(x, h)
        i, f, g, o = (gates[0] + gates[1]).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        return (h.squeeze(0), c.squeeze(0)) if input.dim() == 1 else (h, c)


class LoRAGRUCell(_Cell, nn.GRUCell):
    """nn.GRUCell with LoRA on W_ih and W_hh, all three gates in one: A [r, in], B [3 · hidden_size, r].

    Construction, options, input, output, state dict and errors are those of LoRARNNCell, over an nn.GRUCell.
    """

    TORCH = nn.GRUCell

    def forward(self, input: torch.Tensor, hx: torch.Tensor | None = None) -> torch.Tensor:
        if self._plain():
            return nn.GRUCell.forward(self, input, hx)
        x, h = self._states(input, hx)
        (ir, iz, new), (hr, hz, hn) = (gates.chunk(3, -1) for gates in self._gates(x, h))
        z = torch.sigmoid(iz + hz)
        n = torch.tanh(new + torch.sigmoid(ir + hr) * hn)
        out = n + z * (h - n)
        return out.squeeze(0) if input.dim() == 1 else out
