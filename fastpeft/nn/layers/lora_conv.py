"""LoRAConv1d, LoRAConv2d, LoRAConv3d: a frozen convolution with a LoRA adapter on it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn

from fastpeft.nn.config import Config, adapter_dtype, flag, one_of, size
from fastpeft.nn.init import needs_weight
from fastpeft.nn.layers._construct import constructor_form, from_options, require_parameters, require_unhooked
from fastpeft.nn.merge import Mergeable, added, added_bias
from fastpeft.ops import _checks, lora_conv1d, lora_conv2d, lora_conv3d

_SIZES = ("in_channels", "out_channels", "kernel_size")
_TORCHS = ("stride", "padding", "dilation", "groups", "bias", "padding_mode", "device", "dtype")
_BESIDE = ("lora_bias", "lora_dropout", "adapter_dtype", "freeze_base", "path")
_GEOMETRY = ("stride", "padding", "dilation", "groups", "padding_mode")
_Self = TypeVar("_Self", bound="_LoRAConv")


class _LoRAConv(Mergeable):
    """y = conv(x, W) + bias + scaling · (conv1x1(conv(dropout(x), A), B) + lora_bias): W + scaling · (B A) in W's shape

    LoRAConv2d(original_layer, rank=8, alpha=16, dropout_probability=0.1, bias=False)
        adapts an nn.Conv2d: its weight and bias Parameters become this module's own and are frozen, even if
        something else holds them. Its training flag is kept. Here ``bias`` means LoRA's, as ``lora_bias`` does.
    LoRAConv2d(in_channels, out_channels, kernel_size, rank=4, stride=1, padding=0, ...)
        makes a new base first, frozen too; stride, padding, dilation, groups, bias, padding_mode, device, dtype are
        nn.Conv2d's. Scaling is 0.01 and init randn unless ``alpha``, ``use_rslora`` or ``layout="out_in"`` is given.

    lora_A     [r, in_channels / groups · kernel], a convolution to r channels that all groups share;  lora_B
               [out_channels, r]; the same in either layout, which only selects defaults here
    lora_bias, lora_dropout    LoRA's own bias, and its dropout (also ``dropout``)
    rank, alpha, scaling, use_rslora, init, backend, adapter_dtype, freeze_base    as in LoRALinear
    path       as in fastpeft.ops.lora_conv2d
    Input      x [N, C, *in] or [C, *in] in the weight's dtype, or any under autocast; channels-last is fastest
    Output     y in the memory format of the base; bit-identical to the base layer while disabled
    State dict weight, bias, lora_A, lora_B, lora_bias; always that of the unmerged module, and loading one unmerges.
    Raises     TypeError: original_layer is no plain convolution, a type, or an unknown option.  ValueError: a range, a
               layer with hooks or a parametrization.  Nothing has been changed then.
    Source     Hu et al. 2021, arXiv:2106.09685, eq. 3, as PEFT and LyCORIS read it for convolutions
    """

    TORCH: ClassVar[type[nn.modules.conv._ConvNd]]
    CONV: ClassVar[Any]
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]

    def __init__(self, *args: Any, **options: Any) -> None:
        op = type(self).__name__
        names = (*_SIZES, *(self.POSITIONS or ("rank",)), *_TORCHS)
        adapting = constructor_form(op, args, options, names)
        layout = "out_in" if adapting else self._convention(options, len(args)) or "in_out"
        # A layer without storage: torch checks its arguments, and no random generator is used.
        new: dict[str, Any] = {} if adapting else {n: options.pop(n) for n in (*_SIZES, *_TORCHS) if n in options}
        layer = options.pop("original_layer") if adapting else self._made(op, new | {"device": "meta"})
        if adapting:
            self._require_conv(op, layer)
        kind, freeze = options.pop("adapter_dtype", None), options.pop("freeze_base", True)
        flag(op, "freeze_base", freeze)
        path = options.pop("path", "auto")
        _checks.one_of(op, "path", path, ("auto", "accumulate", "merged"))
        options["bias"] = one_of(op, False, bias=options.get("bias"), lora_bias=options.pop("lora_bias", None))
        drops = {name: options.pop(name, None) for name in ("dropout", "dropout_probability", "lora_dropout")}
        options["dropout"] = one_of(op, None, **drops)
        known = ("original_layer",) if adapting else (*_SIZES, *_TORCHS)
        N, K = layer.weight.shape[0], layer.weight.shape[1:].numel()
        config, own = self._configure(K, N, options, layout, True, *known, *_BESIDE)
        kind = adapter_dtype(op, kind, layer.weight)
        layer = layer if adapting else self._made(op, new)
        super().__init__()
        for name in ("in_channels", "out_channels", "kernel_size", *_GEOMETRY):
            setattr(self, name, getattr(layer, name))
        self._reversed_padding_repeated_twice = list(layer._reversed_padding_repeated_twice)
        self.path = path
        self.register_parameter("weight", layer._parameters["weight"])
        self.register_parameter("bias", layer._parameters["bias"])
        self._adapt(config, self.weight.device, kind, **own)
        self.training = layer.training
        self.reset_parameters()
        if freeze:
            self.weight.requires_grad_(False)
            if self.bias is not None:
                self.bias.requires_grad_(False)

    @classmethod
    def _made(cls, op: str, options: dict[str, Any]) -> Any:
        for name in _SIZES[:2]:
            size(op, name, options.get(name))
        _checks.require(options.get("kernel_size") is not None, op, "kernel_size", "be given", None)
        return cls.TORCH(**options)

    @classmethod
    def _require_conv(cls, op: str, layer: object) -> None:
        """Require a layer that computes a convolution and nothing else, as its replacement does."""
        plain = isinstance(layer, cls.TORCH) and all(
            getattr(type(layer), name) is getattr(cls.TORCH, name) for name in ("forward", "_conv_forward")
        )
        rule = f"be an nn.{cls.TORCH.__name__} with its own forward"
        _checks.require_dtype(plain, op, "original_layer", rule, type(layer).__name__)
        assert isinstance(layer, nn.Module)
        require_parameters(op, layer)
        require_unhooked(op, layer)

    def _adapt(self, config: Config, device: torch.device | str | None, dtype: torch.dtype, **own: Any) -> None:
        # Only layout "out_in" gives B A the shape of W.
        super()._adapt(replace(config, layout="out_in"), device, dtype, **own)
        self.layout = config.layout

    @classmethod
    def from_conv(
        cls: type[_Self],
        conv: nn.Module,
        rank: int | None = None,
        alpha: float | None = None,
        dropout: float | None = None,
        **options: Any,
    ) -> _Self:
        """Adapt ``conv``: rank 16, alpha 32 (unless ``scaling`` is given), dropout 0.05, and the class's options."""
        options["rank"], options["alpha"] = rank, alpha
        options["dropout"] = one_of(cls.__name__, None, dropout=dropout, lora_dropout=options.pop("lora_dropout", None))
        return cls(original_layer=conv, **from_options(cls.RANKS, options))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the factors again by ``init``; the base stays, but pissa and olora take their part out of it."""
        self._require_unmerged("reset_parameters")
        takes = needs_weight(self.init)
        if takes:
            self._require_plain("reset_parameters")
        matrix = self.weight.detach().flatten(1)
        self._reset(matrix)
        if takes:
            self.weight.copy_(matrix.view(self.weight.shape))

    @torch.no_grad()
    def delta_weight(self, *condition: Any) -> torch.Tensor:
        """scaling · B A in W's shape, in fp32 or the factors' wider dtype: what the adapter adds to a base weight."""
        return super().delta_weight(*condition).view(self.weight.shape)

    def forward(self, x: torch.Tensor, *condition: Any) -> torch.Tensor:
        if self._undo is not None or not self._enabled:
            forward: Any = self.TORCH._conv_forward  # which reads the attributes that both have
            base: torch.Tensor = forward(self, x, self.weight, self.bias)
            return base
        call = partial(type(self).CONV, path=self.path, **{name: getattr(self, name) for name in _GEOMETRY})
        return self._conv(call, x, self.weight, self.bias, *condition)

    @torch.no_grad()
    def to_conv(self) -> Any:
        """A new nn.Conv that computes what this module computes in eval mode, with its own copy of the weight."""
        weight, bias = self.weight.detach(), None if self.bias is None else self.bias.detach()
        if self._enabled and not self.merged:
            a, b = self._pair()
            weight = added(self._op, weight, a, b, float(self.scaling))[0]
            bias = added_bias(bias, self.lora_bias, float(self.scaling))
        options = {name: getattr(self, name) for name in (*_SIZES, *_GEOMETRY)}
        layer = self.TORCH(**options, bias=bias is not None, device="meta")
        trained, dtype = self.weight.requires_grad, self.weight.dtype
        layer.weight = nn.Parameter(weight.clone(), trained)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().to(dtype, copy=True), trained)
        return layer.train(self.training)

    def to_linear(self) -> nn.Linear:
        _checks.require(False, self._op, "base", "be linear for to_linear() (to_conv() gives a convolution)", self._op)
        raise AssertionError

    def extra_repr(self) -> str:
        bias = self.bias is not None if self._undo is None else self._undo.had_bias
        parts = [f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"]
        parts += [f"{name}={getattr(self, name)}" for name in _GEOMETRY]
        return f"{', '.join(parts)}, bias={bias}, {self._describe()}" + (", merged" if self.merged else "")


class LoRAConv1d(_LoRAConv):
    __doc__ = str(_LoRAConv.__doc__).replace("Conv2d", "Conv1d")
    TORCH, CONV = nn.Conv1d, staticmethod(lora_conv1d)


class LoRAConv2d(_LoRAConv):
    __doc__ = _LoRAConv.__doc__
    TORCH, CONV = nn.Conv2d, staticmethod(lora_conv2d)


class LoRAConv3d(_LoRAConv):
    __doc__ = str(_LoRAConv.__doc__).replace("Conv2d", "Conv3d")
    TORCH, CONV = nn.Conv3d, staticmethod(lora_conv3d)
