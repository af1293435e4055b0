"""The documents' names: a layer, a factors class and the document's defaults, and nothing more."""

from __future__ import annotations

from fastpeft.nn.factors.adaptive import Adaptive
from fastpeft.nn.layers import LoRALayer, LoRALinear


class AdaLoRALayer(Adaptive, LoRALayer):
    """LoRALayer with `Adaptive` ranks.

    AdaLoRALayer(in_features, out_features, max_rank=16, min_rank=4)                  form "top_k", layout "in_out"
    AdaLoRALayer(input_dimension=, output_dimension=, rank=8, alpha=16., dropout_probability=0.1, bias=False,
                 adaptive_rank=True, rank_allocation="uniform")                       form "scores", layout "out_in"
    AdaLoRALayer(in_features, out_features, form="svd", rank=8)                       form "svd", lora_E [r, 1]
    """


class AdaLoRALinear(Adaptive, LoRALinear):
    """LoRALinear with `Adaptive` ranks: AdaLoRALinear(original_layer, rank=8, ...), AdaLoRALinear(in, out, max_rank=16,
    min_rank=4), AdaLoRALinear.from_linear(layer, rank=16, ...); the forms of AdaLoRALayer."""
