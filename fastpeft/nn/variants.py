"""The documents' names: a layer, a factors class and the document's defaults, and nothing more."""

from __future__ import annotations

from fastpeft.nn.factors.adaptive import Adaptive
from fastpeft.nn.factors.conditional import Conditional
from fastpeft.nn.factors.gated import Gated
from fastpeft.nn.factors.hyper import Hyper
from fastpeft.nn.factors.pruned import Pruned
from fastpeft.nn.factors.sparse import Sparse
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


class ConditionalLoRALayer(Conditional, LoRALayer):
    """LoRALayer with `Conditional` factors: ConditionalLoRALayer(in_features, out_features, num_tasks, rank=4)."""


class ConditionalLoRALinear(Conditional, LoRALinear):  # type: ignore[misc]  # merge takes the task, too
    """LoRALinear with `Conditional` factors: ConditionalLoRALinear(in_features, out_features, num_tasks, rank=4),
    ConditionalLoRALinear.from_linear(layer, num_tasks=3, ...)."""


class HyperLoRALayer(Hyper, LoRALayer):
    """LoRALayer with `Hyper` factors: HyperLoRALayer(in_features, out_features, rank=4, task_embedding_dim=16)."""


class HyperLoRALinear(Hyper, LoRALinear):  # type: ignore[misc]  # merge takes the embedding, too
    """LoRALinear with `Hyper` factors: HyperLoRALinear(in_features, out_features, rank=4, task_embedding_dim=16),
    HyperLoRALinear.from_linear(layer, task_embedding_dim=16, ...)."""


class AttentionGuidedLoRALayer(Gated, LoRALayer):
    """LoRALayer with a gate: AttentionGuidedLoRALayer(in_features, out_features, rank=4, gate="softmax")."""


class AttentionGuidedLoRALinear(Gated, LoRALinear):
    """LoRALinear with a gate: AttentionGuidedLoRALinear(in_features, out_features, rank=4, gate="softmax"),
    AttentionGuidedLoRALinear.from_linear(layer, gate="sigmoid", ...)."""


class SparseLoRALayer(Sparse, LoRALayer):
    """LoRALayer with `Sparse` factors: SparseLoRALayer(in_features, out_features, rank=4, sparsity=0.5,
    pattern="random")."""


class SparseLoRALinear(Sparse, LoRALinear):
    """LoRALinear with `Sparse` factors: SparseLoRALinear(in_features, out_features, rank=4, sparsity=0.5),
    SparseLoRALinear.from_linear(layer, sparsity=0.5, pattern="2:4", ...)."""


class PruningAwareLoRALayer(Pruned, LoRALayer):
    """LoRALayer with `Pruned` factors: PruningAwareLoRALayer(in_features, out_features, rank=4, prune_rate=0.5,
    schedule=None, score="magnitude")."""


class PruningAwareLoRALinear(Pruned, LoRALinear):
    """LoRALinear with `Pruned` factors: PruningAwareLoRALinear(in_features, out_features, rank=4, prune_rate=0.5),
    PruningAwareLoRALinear.from_linear(layer, prune_rate=0.5, score="product", ...)."""
