"""What adapters inside nn.TransformerEncoder need besides the hook of fastpeft/nn/_called.py."""

from __future__ import annotations

from torch import nn

from fastpeft.nn._called import KEY, called
from fastpeft.nn.factors.base import LoRAModule


def _ours(module: nn.Module) -> bool:
    return isinstance(module, LoRAModule) or type(module).__module__.startswith("fastpeft.")


def encoder_safe(model: nn.Module) -> list[str]:
    """Adapt torch's encoders to the modules inside them; call it after modules were put in or taken out.

    A nn.TransformerEncoderLayer that holds any module of fastpeft no longer takes the fast path, and torch.compile can
    see that. A nn.TransformerEncoder around it no longer makes a nested tensor of a padded one: each layer would have
    to pad it again, and padded positions would be zeros in eval mode but numbers in training. Once no such module is
    left inside, both are as they were.

    Returns    the names of the modules that were changed
    """
    changed = []
    for name, module in model.named_modules():
        encoder = isinstance(module, nn.TransformerEncoder)
        if not encoder and not isinstance(module, nn.TransformerEncoderLayer):
            continue
        adapted, marked = any(map(_ours, module.modules())), KEY in module._forward_pre_hooks
        if adapted == marked or (adapted and encoder and not getattr(module, "use_nested_tensor", False)):
            continue
        if adapted:
            module._forward_pre_hooks[KEY] = called
        else:
            del module._forward_pre_hooks[KEY]
        if encoder:
            module.use_nested_tensor = not adapted
        changed.append(name)
    return changed
