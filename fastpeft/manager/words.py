"""One ``apply_…`` per method, with the options of its adapters."""

from __future__ import annotations

from typing import Any, TypeVar

from fastpeft.manager.saving import Saving

_Self = TypeVar("_Self", bound="Words")


def _given(**options: Any) -> dict[str, Any]:
    """The options that are not None; for the others the classes have their own defaults."""
    return {name: value for name, value in options.items() if value is not None}


class Words(Saving):
    """The ``apply_…`` methods."""

    def apply_lora(
        self: _Self,
        target_modules: Any = None,
        rank: int | None = None,
        alpha: float | None = None,
        dropout_probability: float | None = None,
        bias: bool | None = None,
        **options: Any,
    ) -> _Self:
        """LoRA on linear layers, convolutions, attentions and recurrent modules; the options of `LoRALinear`: rank 8,
        alpha 16, dropout 0.1, no bias."""
        given = _given(rank=rank, alpha=alpha, dropout_probability=dropout_probability, bias=bias)
        return self._apply("lora", target_modules, given | options)

    def apply_adalora(
        self: _Self,
        target_modules: Any = None,
        rank: int | None = None,
        alpha: float | None = None,
        dropout_probability: float | None = None,
        bias: bool | None = None,
        adaptive_rank: bool | None = None,
        rank_allocation: str | None = None,
        **options: Any,
    ) -> _Self:
        """AdaLoRA on linear layers; the options of `AdaLoRALinear`. Its form is "scores" unless ``form``, ``max_rank``
        or ``min_rank`` asks for another one."""
        given = _given(rank=rank, alpha=alpha, dropout_probability=dropout_probability, bias=bias)
        given |= _given(adaptive_rank=adaptive_rank, rank_allocation=rank_allocation)
        if not options.keys() & {"form", "max_rank", "min_rank"}:
            given["form"] = "scores"
        return self._apply("adalora", target_modules, given | options)

    def apply_qlora(
        self: _Self,
        target_modules: Any = None,
        rank: int | None = None,
        alpha: float | None = None,
        dropout_probability: float | None = None,
        bias: bool | None = None,
        **options: Any,
    ) -> _Self:
        """LoRA on linear layers whose weight is quantised to 4 bits; the options of `QLoRALinear`."""
        given = _given(rank=rank, alpha=alpha, dropout_probability=dropout_probability, bias=bias)
        return self._apply("qlora", target_modules, given | options)

    def apply_sparse_lora(
        self: _Self,
        target_modules: Any = None,
        rank: int | None = None,
        sparsity: float | None = None,
        pattern: str | None = None,
        **options: Any,
    ) -> _Self:
        """LoRA with masked factors on linear layers; the options of `SparseLoRALinear`."""
        given = _given(rank=rank, sparsity=sparsity, pattern=pattern)
        return self._apply("sparse_lora", target_modules, given | options)

    def apply_pruning_lora(
        self: _Self,
        target_modules: Any = None,
        rank: int | None = None,
        prune_rate: float | None = None,
        schedule: Any = None,
        score: str | None = None,
        **options: Any,
    ) -> _Self:
        """LoRA that is pruned during training, on linear layers; the options of `PruningAwareLoRALinear`."""
        given = _given(rank=rank, prune_rate=prune_rate, schedule=schedule, score=score)
        return self._apply("pruning_lora", target_modules, given | options)

    def apply_conditional_lora(
        self: _Self, target_modules: Any = None, num_tasks: int | None = None, rank: int | None = None, **options: Any
    ) -> _Self:
        """A LoRA for each task on linear layers; the options of `ConditionalLoRALinear`. See ``task``."""
        return self._apply("conditional_lora", target_modules, _given(num_tasks=num_tasks, rank=rank) | options)

    def apply_hyper_lora(
        self: _Self,
        target_modules: Any = None,
        rank: int | None = None,
        task_embedding_dim: int | None = None,
        **options: Any,
    ) -> _Self:
        """LoRA whose factors a network computes from a task's embedding, on linear layers; the options of
        `HyperLoRALinear`. See ``task``."""
        given = _given(rank=rank, task_embedding_dim=task_embedding_dim)
        return self._apply("hyper_lora", target_modules, given | options)

    def apply_attention_guided_lora(
        self: _Self,
        target_modules: Any = None,
        rank: int | None = None,
        gate: str | None = None,
        gate_scale: float | None = None,
        **options: Any,
    ) -> _Self:
        """LoRA with a gate over the rank on linear layers; the options of `AttentionGuidedLoRALinear`."""
        given = _given(rank=rank, gate=gate, gate_scale=gate_scale)
        return self._apply("attention_guided_lora", target_modules, given | options)

    def apply_adapter(
        self: _Self,
        target_modules: Any = None,
        bottleneck: int | None = None,
        activation: str | None = None,
        kind: str = "houlsby",
        **options: Any,
    ) -> _Self:
        """Bottleneck adapters; the options of `Adapter`.

        target_modules    None: the output projections of attentions and MLPs for kind "houlsby", of MLPs for
                          "pfeiffer", by their names in torch's and transformers' models
        kind       "houlsby", "pfeiffer": after linear layers and attentions; "parallel": beside square linear layers
        """
        given = _given(bottleneck=bottleneck, activation=activation, kind=kind)
        return self._apply("adapter", target_modules, given | options)

    def apply_ptuning(
        self: _Self,
        num_virtual_tokens: int = 20,
        embedding_dimension: int | None = None,
        hidden_dimension: int | None = None,
        dropout_probability: float | None = None,
        **options: Any,
    ) -> _Self:
        """P-tuning: a `PTuningEmbedding`, in ``.ptuning_embeddings``; it is inserted into a transformers model.

        Omitted sizes are taken from the model's config or its nn.MultiheadAttention layers.
        """
        given = _given(embedding_dimension=embedding_dimension, hidden_dimension=hidden_dimension)
        given |= _given(num_virtual_tokens=num_virtual_tokens, dropout_probability=dropout_probability)
        return self._prompt("ptuning", given | options)

    def apply_prompt_tuning(
        self: _Self,
        num_virtual_tokens: int = 20,
        init: str | None = None,
        text: str | None = None,
        tokenizer: Any = None,
        **options: Any,
    ) -> _Self:
        """Prompt tuning: a `PromptEmbedding`, in ``.prompt_embeddings``; as ``apply_ptuning``."""
        given = _given(num_virtual_tokens=num_virtual_tokens, init=init, text=text, tokenizer=tokenizer)
        return self._prompt("prompt_tuning", given | options)

    def apply_prefix_tuning(
        self: _Self,
        num_layers: int | None = None,
        num_heads: int | None = None,
        head_dimension: int | None = None,
        prefix_length: int | None = None,
        dropout_probability: float | None = None,
        **options: Any,
    ) -> _Self:
        """Prefix tuning: a `PrefixTuning` of 20 tokens, in ``.prefix_tuning``; as ``apply_ptuning``.

        ``init="text", text=…, tokenizer=…`` starts from the keys and values that a transformers model computes for a
        text's tokens; a random prefix, the default, disturbs a trained model badly.
        """
        given = _given(num_layers=num_layers, num_heads=num_heads, head_dimension=head_dimension)
        given |= _given(prefix_length=prefix_length, dropout_probability=dropout_probability)
        return self._prompt("prefix_tuning", given | options)
