"""Torch modules of several weights, each weight with an adapter of its own: cells, recurrent layers, attention."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn

from fastpeft.nn.config import OPTIONS, Config, adapter_dtype, flag, one_of, refuse_unknown, size
from fastpeft.nn.layers._construct import constructor_form, from_options, require_unhooked
from fastpeft.nn.merge import Mergeable, MergeReport
from fastpeft.ops import _checks

_BESIDE = ("lora_bias", "lora_dropout", "adapter_dtype", "freeze_base")

_Self = TypeVar("_Self", bound="Parts")
_Module = TypeVar("_Module", bound=nn.Module)


@dataclass(frozen=True)
class Site:
    """Where a weight is in its owner: the names of weight and bias, and the rows of the bias that belong to it."""

    weight: str
    bias: str
    rows: slice | None = None


class LoRAPart(Mergeable):
    """The adapter on one weight [N, K] of its owner, which holds that weight under torch's name.

    Calling it gives the update alone, as LoRALayer does. The other methods serve the owner.
    """

    def __init__(self, owner: nn.Module, site: Site, config: Config, dtype: torch.dtype) -> None:
        super().__init__()
        # In a tuple, else nn.Module would register the owner as a child of this module.
        self._owner, self.site = (owner,), site
        self._adapt(config, self.weight.device, dtype)
        self._reset(self.weight.detach())

    @property
    def weight(self) -> Any:  # type: ignore[override]
        return getattr(self._owner[0], self.site.weight)

    @property
    def bias(self) -> Any:  # type: ignore[override]
        """The owner's bias, or this weight's rows of it."""
        bias = getattr(self._owner[0], self.site.bias, None)
        return bias if bias is None or self.site.rows is None else bias[self.site.rows]

    @property
    def active(self) -> bool:
        return self._enabled and self._undo is None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._adapter(x) if self._enabled else x.new_zeros(*x.shape[:-1], self.out_features)

    def product(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x Wᵀ + bias, with the update if it acts."""
        return self._linear(x, weight, bias) if self.active else nn.functional.linear(x, weight, bias)

    def base(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
        """W and its bias in ``dtype``."""
        bias = self.bias
        return self.weight.to(dtype), None if bias is None else bias.to(dtype)

    def update(self, dtype: torch.dtype) -> tuple[Any, Any, Any]:
        """A, scaling · B and scaling · lora_bias in ``dtype``, or None; differentiable."""
        if not self.active:
            return None, None, None
        (a, b), bias = self._pair(), self._lora_bias()
        return a.to(dtype), b.to(dtype) * self.scaling, None if bias is None else bias.to(dtype) * self.scaling

    def effective(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
        """W + scaling · B A and bias + scaling · lora_bias in ``dtype``, which should be wide; differentiable."""
        (weight, bias), (a, b, more) = self.base(dtype), self.update(dtype)
        if more is not None:
            bias = more if bias is None else bias + more
        return weight if a is None else torch.addmm(weight, b, a), bias

    def reset_parameters(self) -> None:
        """Draw the factors again by ``init``, with the current scaling."""
        self._require_resettable()
        self._reset(self.weight.detach())

    def _require_plain(self, doing: str) -> None:
        owner = self._owner[0]
        computed = f"one that is computed at every call on {type(owner).__name__}"
        for name in (self.site.weight, self.site.bias):
            plain = name in owner._parameters or getattr(owner, name, None) is None
            _checks.require(plain, self._op, name, f"be a plain Parameter for {doing}()", computed)
        fits = self.lora_bias is None or self.bias is not None
        _checks.require(fits, self._op, "lora_bias", f"have a bias of the base to go into for {doing}()", "none")

    def _write(self, weight: Any, bias: torch.Tensor | None) -> None:
        self._write_weight(weight)
        if bias is not None:
            self.bias.copy_(bias)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # The base class writes the unmerged base under its own prefix; here the base belongs to the owner.
        before = destination.pop(prefix + "weight", None), destination.pop(prefix + "bias", None)
        owner = prefix[: prefix[:-1].rfind(".") + 1]
        for name, value in zip((self.site.weight, self.site.bias), before, strict=True):
            if value is not None:
                whole = destination[owner + name].detach().clone()
                (whole if value.shape == whole.shape else whole[self.site.rows]).copy_(value)
                destination[owner + name] = whole

    def extra_repr(self) -> str:
        base = f"in_features={self.in_features}, out_features={self.out_features}, {self._describe()}"
        return base + (", merged" if self.merged else "")


def adopt(new: _Module, layer: nn.Module) -> _Module:
    """Turn ``new``, an object without attributes yet, into ``layer``: its attributes and its very Parameters."""
    nn.Module.__init__(new)
    for name, value in layer.__dict__.items():
        if name not in new.__dict__:
            new.__dict__[name] = copy.copy(value) if isinstance(value, (list, dict)) else value
    new._parameters.update(layer._parameters)
    new._buffers.update(layer._buffers)
    new._modules.update(layer._modules)
    new.training = layer.training
    return new


class Parts(nn.Module):
    """A mixin for a class of torch, whose constructor it replaces: that class with an adapter on its weights.

    It adopts the attributes and Parameters of a layer of that class, so the keys of its state dict stay torch's, and
    adds one child for each adapted weight.
    """

    TORCH: ClassVar[type[nn.Module]]
    """What it takes the place of."""
    SIZES: ClassVar[tuple[str, str]] = ("input_size", "hidden_size")
    NAMES: ClassVar[tuple[str, ...]] = ()
    """Torch's options of the form that makes a new base; there they have torch's meaning."""
    OWN: ClassVar[tuple[str, ...]] = ()
    """The class's own options, which `_sites` takes."""

    def __init__(self, *args: Any, **options: Any) -> None:
        op = type(self).__name__
        adapting = constructor_form(op, args, options, (*self.SIZES, "rank"))
        torchs = () if adapting else (*self.SIZES, *self.NAMES)
        base = {name: options.pop(name) for name in torchs if name in options}
        known = {*OPTIONS, *_BESIDE, *self.OWN} | ({"original_layer"} if adapting else set(torchs))
        refuse_unknown(op, options, known)
        own = {name: options.pop(name) for name in self.OWN if name in options}
        kind, freeze = options.pop("adapter_dtype", None), options.pop("freeze_base", True)
        flag(op, "freeze_base", freeze)
        options["bias"] = one_of(op, False, bias=options.get("bias"), lora_bias=options.pop("lora_bias", None))
        drops = {name: options.pop(name, None) for name in ("dropout", "dropout_probability", "lora_dropout")}
        options["dropout"] = one_of(op, None, **drops)
        if adapting:
            layer = options.pop("original_layer")
            self._require_torchs(op, layer)
        else:
            base["dtype"] = adapter_dtype(op, base.get("dtype"))
            layer = self.TORCH(**{name: size(op, name, base.get(name)) for name in self.SIZES} | base)
        sites, configs = self._sites(layer, **own), {}
        for name, site in sites.items():
            weight = dict(layer.named_parameters()).get(site.weight)
            rule = "be a plain Parameter of original_layer (no parametrization)"
            _checks.require(weight is not None, op, site.weight, rule, type(layer).__name__)
            assert weight is not None
            N, K = weight.shape
            layout = "out_in" if adapting else "in_out"
            config = Config.of(op, K, N, dict(options), layout=layout, base=True)
            configs[name] = config, adapter_dtype(op, kind, weight)
        adopt(self, layer)
        if freeze:
            self.requires_grad_(False)
        for name, site in sites.items():
            self._modules[name] = self._part(name, site, *configs[name]).train(layer.training)

    @classmethod
    def _require_torchs(cls, op: str, layer: object) -> None:
        name = f"nn.{cls.TORCH.__name__}"
        plain = isinstance(layer, cls.TORCH) and type(layer).forward is cls.TORCH.forward
        rule = f"be an {name} with {name}'s own forward"
        _checks.require_dtype(plain, op, "original_layer", rule, type(layer).__name__)
        assert isinstance(layer, nn.Module)
        require_unhooked(op, layer)
        for held, parameter in layer.named_parameters():
            lazy = isinstance(parameter, nn.parameter.UninitializedParameter)
            _checks.require(not lazy, op, held, "be initialised", "a lazy parameter")
            _checks.floats(op, held, parameter.dtype)

    @classmethod
    def _adapting(cls: type[_Self], layer: nn.Module, rank: Any, alpha: Any, dropout: Any, options: Any) -> _Self:
        options |= {"rank": rank, "alpha": alpha, "dropout": dropout}
        return cls(original_layer=layer, **from_options(("rank",), options))

    @classmethod
    def _sites(cls, layer: Any) -> dict[str, Site]:
        """The weights that get an adapter, by the name of the child that holds it."""
        raise NotImplementedError

    def _part(self, name: str, site: Site, config: Config, dtype: torch.dtype) -> Mergeable:
        return LoRAPart(self, site, config, dtype)

    def parts(self) -> dict[str, Mergeable]:
        """The adapters, by the names of the children."""
        return {name: child for name, child in self._modules.items() if isinstance(child, Mergeable)}

    def reset_parameters(self) -> None:
        """Draw the factors again by ``init``; the base stays, but pissa and olora take their part out of it."""
        for part in self.parts().values():
            part._require_resettable()
        for part in self.parts().values():
            restart: Any = part.reset_parameters
            restart()

    @property
    def enabled(self) -> bool:
        return any(part.enabled for part in self.parts().values())

    def enable(self) -> None:
        """Let every adapter act again."""
        for part in self.parts().values():
            part.enable()

    def disable(self) -> None:
        """Unmerge every adapter and take it out of later calls; the layer then computes what torch's does."""
        for part in self.parts().values():
            part.disable()

    @property
    def merged(self) -> bool:
        return all(part.merged for part in self.parts().values())

    def merge(self, keep_backup: bool = True) -> dict[str, MergeReport]:
        """Merge every weight and bias with its update, in place, as in LoRALinear; returns the reports by child.

        Raises     ValueError: as LoRALinear.merge, and a lora_bias without a bias of the base; nothing has been changed
                   then.
        """
        done, reports = [], {}
        try:
            for name, part in self.parts().items():
                reports[name] = part.merge()
                done.append(part)
        except ValueError:
            for part in done:
                part.unmerge()
            raise
        if not keep_backup:
            for part in done:
                part.unmerge()
                part.merge(keep_backup=False)
        return reports

    def unmerge(self) -> dict[str, MergeReport]:
        """Restore every base from before ``merge``, as in LoRALinear; returns the reports by child.

        Raises     ValueError: an adapter that is not merged, or cannot be unmerged; nothing has been changed then.
        """
        for part in self.parts().values():
            part._require_merged("unmerge")
            part._require_plain("unmerge")
        return {name: part.unmerge() for name, part in self.parts().items()}

    def _to_torch(self, doing: str) -> Any:
        """A new layer of torch's class that computes what this one computes in eval mode, with its own weights."""
        for part in self.parts().values():  # before a copy, which torch refuses to make of a computed weight
            if part.enabled and not part.merged:
                part._require_plain(doing)
        twin = copy.deepcopy(self)
        for part in twin.parts().values():
            if part.enabled and not part.merged:
                part.merge()
        plain = adopt(self.TORCH.__new__(self.TORCH), twin)
        for name in self.parts():
            del plain._modules[name]
        return plain

    def _load_from_state_dict(self, *args: Any) -> None:
        for part in self.parts().values():
            if part.merged:
                part.unmerge()
        super()._load_from_state_dict(*args)
