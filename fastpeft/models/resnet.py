"""LoRAResNet: a convolutional network with LoRA in its own convolutions and a head for other classes."""

from __future__ import annotations

import importlib
from typing import Any, TypeVar

import torch
from torch import nn

from fastpeft.models._adapted import Adapted, adapt, slide_options
from fastpeft.nn.config import flag, size
from fastpeft.nn.layers.lora_conv import LoRAConv2d
from fastpeft.ops import _checks

_OPTIONS = ("adapter_dtype",)
_NORMS = (nn.modules.batchnorm._BatchNorm,)
_Self = TypeVar("_Self", bound="LoRAResNet")


def _resnet50(op: str) -> nn.Module:
    try:
        models = importlib.import_module("torchvision.models")
    except (ImportError, RuntimeError) as error:  # a torchvision built for another torch raises RuntimeError
        raise ImportError(f"{op}: torchvision must be installed for model=None, or a model be given") from error
    model: nn.Module = models.resnet50(weights=None)
    return model


class LoRAResNet(Adapted):
    """An image classifier: LoRA in every nn.Conv2d of a convolutional network, and a trained head.

    LoRAResNet(num_classes, rank=4, model=None, **options)

    num_classes    of the head, the last nn.Linear of the model; if its number of outputs differs, a new head
               replaces it
    rank       of every adapter
    model      any module of convolutions, which is adapted in place, with its weights; request pretrained weights when
               making it, as in ``model=torchvision.models.resnet50(weights="DEFAULT")``. None makes torchvision's
               resnet50, not pretrained: nothing is downloaded here
    freeze_norm    batch normalisations stay in eval mode, so that training does not change their statistics and a
               sample's output does not depend on its batch. False lets them follow the mode; their statistics are then
               part of ``efficient_state_dict``
    options    of LoRAConv2d: by default init "randn", scaling 0.01 and no dropout; ``alpha`` selects kaiming and α/r
    Call       as the model's own
    Output     logits [N, num_classes]: the model's own, or the ``logits`` of its output
    Raises     TypeError: not a module, an unknown option.  ValueError: no convolution or no nn.Linear in the model, a
               range. The model is unchanged then.  ImportError: model=None without torchvision.
    """

    def __init__(
        self,
        num_classes: int,
        rank: int = 4,
        model: nn.Module | None = None,
        *,
        freeze_norm: bool = True,
        **options: Any,
    ) -> None:
        op = type(self).__name__
        size(op, "num_classes", num_classes)
        flag(op, "freeze_norm", freeze_norm)
        given = slide_options(op, size(op, "rank", rank), options, *_OPTIONS, "freeze_norm")
        _checks.require_dtype(
            model is None or isinstance(model, nn.Module), op, "model", "be an nn.Module or None", type(model).__name__
        )
        resnet = _resnet50(op) if model is None else model
        convs = {path: module for path, module in resnet.named_modules(remove_duplicate=False)
                 if isinstance(module, nn.Conv2d)}  # fmt: skip
        heads = [path for path, module in resnet.named_modules() if isinstance(module, nn.Linear)]
        _checks.require(bool(convs), op, "model", "have an nn.Conv2d", type(resnet).__name__)
        _checks.require(bool(heads), op, "model", "have an nn.Linear as its head", type(resnet).__name__)
        adapt(resnet, convs, lambda layer: LoRAConv2d(original_layer=layer, **given))
        super().__init__()
        self.resnet, self.num_classes, self.freeze_norm = resnet, num_classes, freeze_norm
        head: Any = resnet.get_submodule(heads[-1])
        if head.out_features != num_classes:
            like = head.weight
            head = nn.Linear(head.in_features, num_classes, head.bias is not None, like.device, like.dtype)
            adapt(resnet, {heads[-1]: resnet.get_submodule(heads[-1])}, lambda _: head)
        self.train(resnet.training)
        self._freeze(head.parameters())

    def train(self: _Self, mode: bool = True) -> _Self:
        super().train(mode)
        if self.freeze_norm:
            for module in self.modules():
                if isinstance(module, _NORMS):
                    module.eval()
        return self

    def _trained(self) -> dict[str, torch.Tensor]:
        trained = super()._trained()
        if not self.freeze_norm:
            paths = [path for path, module in self.named_modules() if isinstance(module, _NORMS)]
            inside = tuple(path + "." for path in paths)
            trained |= {name: buffer for name, buffer in self.named_buffers() if name.startswith(inside)}
        return trained

    def forward(self, *args: Any, **inputs: Any) -> torch.Tensor:
        out = self.resnet(*args, **inputs)
        logits: torch.Tensor = out if isinstance(out, torch.Tensor) else out.logits
        return logits
