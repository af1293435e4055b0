"""The base of every LoRA module: lora_A, lora_B, lora_bias, their options and the switch; the plain factors.

A variant is a mixin: a subclass of `LoRAModule` in a file of its own, put before a layer (``class SparseLoRALinear(
Sparse, LoRALinear)``). Its state lies flat on the module under its public names, so that state dicts, ``deepcopy``,
pickles, ``.to()`` and sharding see only parameters and buffers of the module. It may override the following, and
nothing of a layer:

    OWN, SIZES, POSITIONS, RANKS, LAYOUT    its options, beside `AdapterOptions`
    _convention       the layout of a module made from sizes, where it depends on the options
    _configure        options in, Config out: checked before anything is built
    _adapt            makes parameters and buffers, without values
    _reset            gives them their first values, with a zero update
    factors           A [R, K], B [N, R] as they act; enough for a variant that is a function of parameters
    _adapter, _linear, _linear4bit, _conv    the product, for a variant that acts on activations; they take forward's
                      arguments beside x
    _pair             A and B of the one matrix that ``merge`` adds; a ValueError if there is none
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from fastpeft.nn import init as schemes
from fastpeft.nn._called import must_be_called
from fastpeft.nn.config import OPTIONS, Config, refuse_unknown
from fastpeft.ops import Weight4bit, _checks, linear4bit_lora, lora_adapter, lora_linear


class LoRAModule(nn.Module):
    """The base class of the LoRA modules.

    ``scaling`` (float or 0-d tensor), ``dropout_probability`` and ``backend`` are read at every call and may be set.
    """

    OWN: ClassVar[tuple[str, ...]] = ()
    """Options of the factors beside `AdapterOptions`."""
    SIZES: ClassVar[tuple[str, str]] = ("input_dimension", "output_dimension")
    """What a LoRALayer's sizes by position mean."""
    POSITIONS: ClassVar[tuple[str, ...] | None] = None
    """Names by position after the sizes, where they are not those of the layer: the order of the document."""
    RANKS: ClassVar[tuple[str, ...]] = ("rank",)
    """The options that say how large the rank is; ``from_linear`` adds its default where none is given."""
    LAYOUT: ClassVar[str | None] = None
    """The layout of a module that is made from sizes, where it is not that of the layer."""

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_bias: nn.Parameter | None
    scaling: float | torch.Tensor

    @property
    def _op(self) -> str:
        return type(self).__name__

    @classmethod
    def _convention(cls, options: dict[str, Any], positions: int) -> str | None:
        """The default layout of a module made from sizes; None leaves it to the layer.

        options        all of them, sizes included, those given by position under their names
        positions      how many were given by position
        """
        return cls.LAYOUT

    @classmethod
    def _configure(
        cls, in_features: int, out_features: int, options: dict[str, Any], layout: str, base: bool, *known: str
    ) -> tuple[Config, dict[str, Any]]:
        """Config and the factors' own options, taken out of ``options``; what is left must be ``known`` to the layer.

        Raises     ValueError, TypeError: as Config.of; TypeError: an unknown option.
        """
        op = cls.__name__
        refuse_unknown(op, options, (*OPTIONS, *cls.OWN, *known))
        own = {name: options.pop(name) for name in cls.OWN if name in options}
        config = Config.of(op, in_features, out_features, options, layout=layout, base=base)
        return config, own

    def _adapt(self, config: Config, device: torch.device | str | None, dtype: torch.dtype) -> None:
        """Make the factors, without values; a variant takes its own options as keywords."""
        self.in_features, self.out_features = config.in_features, config.out_features
        self.rank, self.alpha, self.scaling = config.rank, config.alpha, config.scaling
        self.use_rslora, self.init, self.layout = config.use_rslora, config.init, config.layout
        self.dropout_probability, self.backend = config.dropout, config.backend
        self._transposed, self._enabled = config.layout == "in_out", True
        must_be_called(self)
        a, b = (config.rank, config.in_features), (config.out_features, config.rank)
        if self._transposed:
            a, b = a[::-1], b[::-1]
        self.lora_A = nn.Parameter(torch.empty(a, device=device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.empty(b, device=device, dtype=dtype))
        bias = torch.zeros(config.out_features, device=device, dtype=dtype) if config.bias else None
        self.register_parameter("lora_bias", None if bias is None else nn.Parameter(bias))

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A [R, K] and B [N, R] whatever the layout: the parameters or views of them, differentiable."""
        held: dict[str, Any] = self._parameters
        try:
            # nn.Module's attribute lookup costs a tiny layer several microseconds a call.
            a, b = held["lora_A"], held["lora_B"]
        except KeyError:  # torch's parametrize or prune computes one of them
            a, b = self.lora_A, self.lora_B
        return (a.t(), b.t()) if self._transposed else (a, b)

    def _pair(self, *condition: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """A [R, K], B [N, R] whose scaling · B A is the update as one matrix; ``condition`` as forward takes it.

        Raises     ValueError: the update is not one matrix, or needs a condition.
        """
        self._unconditional(condition)
        return self.factors()

    def _unconditional(self, condition: tuple[Any, ...]) -> None:
        rule = "be x alone: these factors take no condition"
        _checks.require_dtype(not condition, self._op, "arguments", rule, f"{len(condition)} more")

    def _lora_bias(self) -> torch.Tensor | None:
        try:
            bias: torch.Tensor | None = self._parameters["lora_bias"]
        except KeyError:  # see factors
            bias = self.lora_bias
        return bias

    def _adapter(self, x: torch.Tensor, *condition: Any) -> torch.Tensor:
        """The update alone: scaling · (drop(x) Aᵀ Bᵀ + lora_bias)."""
        if condition:
            self._unconditional(condition)
        a, b = self.factors()
        p = self.dropout_probability if self.training else 0.0
        return lora_adapter(x, a, b, self._lora_bias(), scale=self.scaling, dropout=p, backend=self.backend)

    def _linear(self, x: torch.Tensor, weight: Any, bias: Any, *condition: Any) -> torch.Tensor:
        """x Wᵀ + bias and the update."""
        if condition:
            self._unconditional(condition)
        a, b = self.factors()
        try:  # `_lora_bias` without its frame, which is 2 % of a tiny layer's call
            lora_bias = self._parameters["lora_bias"]
        except KeyError:
            lora_bias = self.lora_bias
        p = self.dropout_probability if self.training else 0.0
        return lora_linear(x, weight, a, b, bias, lora_bias, scale=self.scaling, dropout=p, backend=self.backend)

    def _linear4bit(self, x: torch.Tensor, weight: Weight4bit, bias: Any, *condition: Any) -> torch.Tensor:
        """The same over a weight of 4 bits."""
        if condition:
            self._unconditional(condition)
        a, b = self.factors()
        p = self.dropout_probability if self.training else 0.0
        return linear4bit_lora(
            x, weight, a, b, bias, self._lora_bias(), scale=self.scaling, dropout=p, backend=self.backend
        )

    def _conv(self, conv: Any, x: torch.Tensor, weight: Any, bias: Any, *condition: Any) -> torch.Tensor:
        """The same over a convolution, whose update is one matrix; conv: lora_conv1d, 2d or 3d with its geometry."""
        a, b = self._pair(*condition)
        p = self.dropout_probability if self.training else 0.0
        y: torch.Tensor = conv(
            x, weight, a, b, bias, self._lora_bias(), scale=self.scaling, dropout=p, backend=self.backend
        )
        return y

    @torch.no_grad()
    def delta_weight(self, *condition: Any) -> torch.Tensor:
        """scaling · B A [N, K], in fp32 or the factors' wider dtype: what the adapter adds to a base weight."""
        a, b = self._pair(*condition)
        dtype = torch.promote_types(a.dtype, torch.float32)
        return (b.to(dtype) @ a.to(dtype)) * self.scaling

    def _reset(self, weight: torch.Tensor | None) -> None:
        a, b = (self.lora_A.t(), self.lora_B.t()) if self._transposed else (self.lora_A, self.lora_B)
        schemes.initialise(self.init, a.detach(), b.detach(), float(self.scaling), weight)
        if self.lora_bias is not None:
            nn.init.zeros_(self.lora_bias)

    @property
    def enabled(self) -> bool:
        return self._enabled

    def enable(self) -> None:
        """Let the adapter act again."""
        self._enabled = True

    def disable(self) -> None:
        """Take the adapter out of every later call; its parameters stay as they are."""
        self._enabled = False

    def _describe(self) -> str:
        parts = [f"rank={self.rank}", "" if self.alpha is None else f"alpha={self.alpha:g}"]
        parts += [f"scaling={float(self.scaling):g}", f"dropout={self.dropout_probability:g}", f"init={self.init}"]
        parts += ["lora_bias=True" if self.lora_bias is not None else "", f"layout={self.layout}"]
        parts += ["" if self._enabled else "disabled", f"backend={self.backend}" if self.backend else ""]
        return ", ".join(part for part in parts if part)
