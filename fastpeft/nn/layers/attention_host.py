"""An attention that calls its out_proj, so that any adapter can take its place; and the conversion back to torch's."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fastpeft.nn._called import KEY, called
from fastpeft.nn.layers._construct import called_out_proj
from fastpeft.nn.layers._parts import LoRAPart, adopt
from fastpeft.nn.layers.lora_attention import LoRAMultiheadAttention


def host_of(attention: nn.MultiheadAttention, options: dict[str, Any] | None = None) -> LoRAMultiheadAttention:
    """``attention`` on the same Parameters, with a plain nn.Linear as its out_proj, which is called.

    options    of adapters on the input projections (query, key, value); None: no adapters
    Raises     ValueError, TypeError: as LoRAMultiheadAttention.
    """
    kind = LoRAMultiheadAttention
    if options is None:
        kind._require_torchs(kind.__name__, attention)
        host = adopt(kind.__new__(kind), attention)
        host._forward_pre_hooks[KEY] = called
    else:
        host = kind(original_layer=attention, targets="in_proj", **options)
    host._modules["out_proj"] = called_out_proj(host.out_proj)
    return host


def input_parts(host: LoRAMultiheadAttention) -> dict[str, LoRAPart]:
    """The adapters on the input projections (query, key, value), by their names."""
    return {name: part for name, part in host.parts().items() if isinstance(part, LoRAPart)}


def torchs_if_plain(host: LoRAMultiheadAttention) -> nn.MultiheadAttention | None:
    """An nn.MultiheadAttention on the same Parameters; None if an adapter is left inside."""
    if host.parts() or type(host.out_proj) is not nn.Linear:
        return None
    plain = adopt(nn.MultiheadAttention.__new__(nn.MultiheadAttention), host)
    kind = NonDynamicallyQuantizableLinear
    plain._modules["out_proj"] = adopt(kind.__new__(kind), host.out_proj)
    return plain
