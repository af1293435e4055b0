"""QLoRALinear modules, and what of them no cast and no training may touch."""

import torch

from fastpeft.nn import QLoRALinear
from nn_cases import linear

PARTS = ["weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map"]
SCALES = ("absmax", "nested_quant_map", "nested_absmax", "nested_offset")


def trained(K=32, N=24, dtype=torch.float32, seed=0, base_bias=True, **options):
    """A QLoRALinear whose update is not zero."""
    options = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "bias": True, **options}
    module = QLoRALinear(linear(K, N, dtype, seed, bias=base_bias), **options)
    with torch.no_grad():
        module.lora_B.normal_(0, 0.2)
        if module.lora_bias is not None:
            module.lora_bias.normal_()
    return module


def fixed(module):
    """Clones of what no cast and no training may touch."""
    held = {"weight": module.weight, **{name: getattr(module, name) for name in SCALES}}
    return {name: tensor.detach().clone() for name, tensor in held.items() if tensor is not None}


def same(one, two):
    return one.keys() == two.keys() and all(
        one[key].dtype == two[key].dtype and torch.equal(one[key], two[key]) for key in one
    )


def without(state, name):
    return {key: value for key, value in state.items() if key != name}
