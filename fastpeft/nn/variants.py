"""The public names: each joins a factors class and a layer with its documented defaults, and adds nothing more."""

from __future__ import annotations

from fastpeft.nn.factors.adaptive import Adaptive
from fastpeft.nn.factors.conditional import Conditional
from fastpeft.nn.factors.gated import Gated
from fastpeft.nn.factors.hyper import Hyper
from fastpeft.nn.factors.pruned import Pruned
from fastpeft.nn.factors.sparse import Sparse
from fastpeft.nn.layers import LoRALayer, LoRALinear


class AdaLoRALayer(Adaptive, LoRALayer):
    """LoRALayer of which some ranks act, each with a gain                    Zhang et al. 2023, arXiv:2303.10512

    AdaLoRALayer(in_features, out_features, max_rank=16, min_rank=4)                  form "top_k", layout "in_out"
        the ``current_rank`` largest of ``importance`` [r] act; ``update_rank(threshold)`` counts them
    AdaLoRALayer(input_dimension=, output_dimension=, rank=8, alpha=16., dropout_probability=0.1, bias=False,
                 adaptive_rank=True, rank_allocation="uniform")                       form "scores", layout "out_in"
        a rank acts if its ``rank_importance`` [r], or for "importance" and "magnitude" the score that
        ``update_rank`` measured, is over 0.1; the largest always acts
    AdaLoRALayer(in_features, out_features, form="svd", rank=8)                       form "svd", the paper's
        ``lora_E`` [r, 1] is the gain; a `RankAllocator` takes ranks out. lora_A, lora_B ~ N(0, 0.02), lora_E zero
    importance_grad    False: the gain selects ranks, and neither multiplies them nor is trained
    ``current_rank`` and ``get_effective_rank()`` wait for the device; ``compact()`` drops the ranks that do not act.
    Input, output, other options    as LoRALayer
    Raises     ValueError: a range, options of two forms.  TypeError: a type, or an unknown option.
    """


class AdaLoRALinear(Adaptive, LoRALinear):
    """LoRALinear of which some ranks act, each with a gain                   Zhang et al. 2023, arXiv:2303.10512

    AdaLoRALinear(original_layer, rank=8, ...), AdaLoRALinear(in_features, out_features, max_rank=16, min_rank=4),
    AdaLoRALinear.from_linear(layer, rank=16, form="svd", ...): the forms of AdaLoRALayer, with a base as in LoRALinear.
    """


class ConditionalLoRALayer(Conditional, LoRALayer):
    """LoRALayer with factors of its own for each task                       Hu et al. 2021, arXiv:2106.09685, eq. 3

    ConditionalLoRALayer(in_features, out_features, num_tasks, rank=4)
    lora_A     [tasks, in, r], lora_B [tasks, r, out]; for layout "out_in" [tasks, r, in], [tasks, out, r]
    lora_bias  [tasks, out], with ``bias``
    Call       (x [..., in], task_id): an int, or integers of one element or of x's first dimensions, (N,) or (N, seq);
               -1 is no task. Without task_id that of ``fastpeft.task``
    Output     [..., out] in x.dtype. No row has a copy of its A
    Other options as in LoRALayer
    Raises     ValueError: no task_id, a shape, an id below -1 or not below num_tasks; ids on a GPU are not checked, to
               avoid a sync, and give rows of NaN.  TypeError: ids that are not integers, or an unknown option.
    """


class ConditionalLoRALinear(Conditional, LoRALinear):  # type: ignore[misc]  # merge takes the task, too
    """LoRALinear with factors of its own for each task                      Hu et al. 2021, arXiv:2106.09685, eq. 3

    ConditionalLoRALinear(in_features, out_features, num_tasks, rank=4),
    ConditionalLoRALinear.from_linear(layer, num_tasks=3, ...); called as ConditionalLoRALayer, where -1 is the base
    alone. ``merge(task_id)`` merges one task's update.
    """


class HyperLoRALayer(Hyper, LoRALayer):
    """LoRALayer whose factors a small network makes from a task's embedding  Karimi Mahabadi et al., arXiv:2106.04489

    HyperLoRALayer(in_features, out_features, rank=4, task_embedding_dim=16)
    hyper_net  Linear(E, 64), ReLU, Linear(64, r · (in + out)), instead of lora_A and lora_B; the half that gives B
               is zero at init
    Call       (x [..., in], task_embedding): (E,) or (1, E) for all rows, (N, E) with x [N, ..., in]; without: that of
               ``fastpeft.task``
    Output     [..., out] in x.dtype
    Other options as in LoRALayer, but init
    Raises     ValueError: no task_embedding, or a shape.  TypeError: not a float tensor, or an unknown option.
    """


class HyperLoRALinear(Hyper, LoRALinear):  # type: ignore[misc]  # merge takes the embedding, too
    """LoRALinear whose factors a small network makes from a task's embedding Karimi Mahabadi et al., arXiv:2106.04489

    HyperLoRALinear(in_features, out_features, rank=4, task_embedding_dim=16),
    HyperLoRALinear.from_linear(layer, task_embedding_dim=16, ...); called as HyperLoRALayer;
    ``merge(task_embedding)`` merges the update of one embedding.
    """


class AttentionGuidedLoRALayer(Gated, LoRALayer):
    """LoRALayer with a gate over the rank: y = scaling · ((g ∘ s) Bᵀ + lora_bias), s = drop(x) Aᵀ

    AttentionGuidedLoRALayer(in_features, out_features, rank=4, gate="softmax", gate_scale=1.)
    gate       g = gate_scale · softmax(attention(drop(x))) over the rank, whose mean is 1/r, or "sigmoid"
    gate_scale gate_scale=rank makes the mean of a softmax 1
    attention  nn.Linear(in, r) beside lora_A and lora_B; it shares A's read of x
    Input, output, other options    as LoRALayer
    Raises     ValueError: rank 1 with softmax, whose gate is always 1; merge(), because the update depends on x.
               TypeError: a type, or an unknown option.
    """


class AttentionGuidedLoRALinear(Gated, LoRALinear):
    """LoRALinear with the gate of AttentionGuidedLoRALayer over the rank.

    AttentionGuidedLoRALinear(in_features, out_features, rank=4, gate="softmax"),
    AttentionGuidedLoRALinear.from_linear(layer, gate="sigmoid", ...).
    """


class SparseLoRALayer(Sparse, LoRALayer):
    """LoRALayer with masked factors, which hold zeros where the mask does    n:m: Zhou et al. 2021, arXiv:2102.04010

    SparseLoRALayer(in_features, out_features, rank=4, sparsity=0.5, pattern="random")
    sparsity   share of zeros, in [0, 1]; an n:m pattern has its own. ``.sparsity`` is measured on both masks
    pattern    "random": each element alone · "block": ``block_size`` (16) neighbours together · "n:m", such as "2:4": n
               of every m neighbours are kept. Neighbours run along the inputs in A and along the outputs in B
    mask_A, mask_B    in the shapes of lora_A and lora_B, of 0 and 1; kept, and in state dicts, as one bit an element
    ``apply_sparsity(sparsity)`` draws the masks again. SGD, Adam, AdamW and Lion leave zeros alone; for others:
    ``fastpeft.remask_after``.
    Input, output, other options    as LoRALayer
    Raises     ValueError: a range, an unknown pattern.  TypeError: a type, or an unknown option.
    """


class SparseLoRALinear(Sparse, LoRALinear):
    """LoRALinear with the masked factors of SparseLoRALayer.

    SparseLoRALinear(in_features, out_features, rank=4, sparsity=0.5),
    SparseLoRALinear.from_linear(layer, sparsity=0.5, pattern="2:4", ...).
    """


class PruningAwareLoRALayer(Pruned, LoRALayer):
    """LoRALayer whose elements, or ranks, are zeroed for good as training goes on   Han et al. 2015, arXiv:1506.02626

    PruningAwareLoRALayer(in_features, out_features, rank=4, prune_rate=0.5, schedule=None, score="magnitude")
    prune_rate the target of ``prune()`` without a rate: a share of zeros in [0, 1]
    schedule   rates, or a function of the step that gives one: a step is one ``prune()``; the last rate stays
    score      "magnitude": |element| · "gradient": |element · gradient|, after a backward · "product": ‖A_k‖ ‖B_k‖ of a
               rank, which is pruned as a whole
    mask_A, mask_B, prune_step    as in SparseLoRALayer, and the calls that took a rate of the schedule
    ``prune(rate)`` zeroes what scores below that quantile of its factor; masks only grow. ``compact()`` drops the ranks
    whose A or B is masked completely.
    Input, output, other options    as LoRALayer
    Raises     ValueError: a rate out of range, an unknown score; "gradient" before a backward.  TypeError: a type, or
               an unknown option.
    """


class PruningAwareLoRALinear(Pruned, LoRALinear):
    """LoRALinear that is pruned as PruningAwareLoRALayer is.

    PruningAwareLoRALinear(in_features, out_features, rank=4, prune_rate=0.5),
    PruningAwareLoRALinear.from_linear(layer, prune_rate=0.5, score="product", ...).
    """
