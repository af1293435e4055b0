"""The modules that the tests of fastpeft.nn share."""

import torch
from torch import nn

from fastpeft.nn import LoRALinear


def linear(K=32, N=24, dtype=torch.float32, seed=0, **options):
    torch.manual_seed(seed)
    return nn.Linear(K, N, dtype=dtype, **options)


def trained(dropout=0.0, K=32, N=24, dtype=torch.float32, seed=0, base_bias=True, **options):
    """A LoRALinear whose update is not zero."""
    options = {"rank": 4, "alpha": 8.0, "bias": True, **options}
    module = LoRALinear(linear(K, N, dtype, seed, bias=base_bias), dropout=dropout, **options)
    with torch.no_grad():
        module.lora_B.normal_(0, 0.2)
        if module.lora_bias is not None:
            module.lora_bias.normal_()
    return module
