"""One word a method: the adapters of each, put into the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from torch import nn

from fastpeft.manager import defaults, methods, prompts, targets
from fastpeft.manager.account import Account
from fastpeft.manager.placing import Entry, Placer
from fastpeft.nn.layers.stack import AdapterStack
from fastpeft.ops import _checks

_Self = TypeVar("_Self", bound="Applying")


def _given(**options: Any) -> dict[str, Any]:
    """The options that are not None: the classes have their own defaults."""
    return {name: value for name, value in options.items() if value is not None}


class Applying(Account):
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
        """LoRA on linear layers, attentions and recurrent modules; the options of `LoRALinear`: rank 8, alpha 16,
        dropout 0.1, no bias."""
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
        """LoRA that is pruned on the way, on linear layers; the options of `PruningAwareLoRALinear`."""
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
        """LoRA that a network makes of a task's embedding, on linear layers; the options of `HyperLoRALinear`. See
        ``task``."""
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

        target_modules    None: for kind "houlsby" every output projection of an attention and of an MLP, for "pfeiffer"
                          of an MLP, by the names that torch's and transformers' models give them
        kind       "houlsby", "pfeiffer": behind linear layers and attentions; "parallel": beside square linear layers
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
        """P-tuning: a `PTuningEmbedding`, in ``.ptuning_embeddings``; into a model of transformers it is inserted.

        Sizes that are left out are the model's: of its config, or of its nn.MultiheadAttention layers.
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
        """Prefix tuning: a `PrefixTuning` of 20 tokens, in ``.prefix_tuning``; as ``apply_ptuning``."""
        given = _given(num_layers=num_layers, num_heads=num_heads, head_dimension=head_dimension)
        given |= _given(prefix_length=prefix_length, dropout_probability=dropout_probability)
        return self._prompt("prefix_tuning", given | options)

    # -- what they share -----------------------------------------------------------------------------------------------

    def _apply(self: _Self, method: str, target_modules: Any, options: dict[str, Any]) -> _Self:
        op = f"apply_{method}"
        name = self._free_name(op, method, options.pop("adapter_name", None))
        saved = self._named_modules(op, options.pop("modules_to_save", None))
        for entry in self._place(op, name, method, target_modules, options, {}, saved):
            entry.forget_packed()
        self._save_whole(saved)
        return self

    def _place(
        self,
        op: str,
        name: str,
        method: str,
        wanted: Any,
        options: dict[str, Any],
        each: dict[str, Any],
        spared: dict[str, nn.Module] | None = None,
    ) -> list[Entry]:
        """Put an adapter in, freeze the model before the first one, and take note of it.

        each       options of single places, by their paths
        spared     what gets no adapter, nor anything below it
        """
        kind, modules = options.get("kind", ""), targets.walk(self.model)
        if wanted is None:
            wanted = defaults.of(op, method, self.model, modules, kind)
        found = targets.find(
            op, modules, wanted, lambda module: methods.supports(method, module, kind), methods.described(method, kind)
        )
        _checks.require("" not in found, op, "model", "hold the layers to adapt, not be one", type(self.model).__name__)
        whole = [*(spared or {}), *self.saved_modules]
        left = {path: m for path, m in found.items() if not any(f"{path}.".startswith(f"{s}.") for s in whole)}
        _checks.require(bool(left), op, "target_modules", "match more than modules_to_save", whole)
        flags = self._flags_now()
        entries = Placer(op, self.model, name, method, options, each).place(left, modules)
        self._freeze(flags)
        self.entries += entries
        self.methods[name] = {"method": method, "options": dict(options), "each": each}
        return entries

    def _save_whole(self, saved: dict[str, nn.Module]) -> None:
        self.saved_modules |= saved
        for module in saved.values():
            for parameter in module.parameters():
                if parameter.is_floating_point():
                    parameter.requires_grad_(True)

    def _prompt(self: _Self, method: str, options: dict[str, Any]) -> _Self:
        op = f"apply_{method}"
        name = self._free_name(op, method, options.pop("adapter_name", None))
        saved = self._named_modules(op, options.pop("modules_to_save", None))
        module, recorded = prompts.made(op, method, self.model, options)
        flags = self._flags_now()
        place = prompts.put_in(op, self.model, module)
        self._freeze(flags)
        self.entries.append(Entry(name, method, "", module, place))
        self.methods[name] = {"method": method, "options": recorded, "each": {}}
        self._save_whole(saved)
        return self

    def _free_name(self, op: str, method: str, name: str | None) -> str:
        taken = set(self.methods)
        for module in self.model.modules():
            taken |= set(module.names()) if isinstance(module, AdapterStack) else set()
        if name is None:
            numbered = (method if i == 1 else f"{method}_{i}" for i in range(1, len(taken) + 2))
            return next(each for each in numbered if each not in taken)
        _checks.require_dtype(isinstance(name, str), op, "adapter_name", "be a string", type(name).__name__)
        sound = bool(name) and "." not in name and "/" not in name
        _checks.require(sound, op, "adapter_name", "be a name without dots and slashes", repr(name))
        _checks.require(name not in taken, op, "adapter_name", "be free", repr(name))
        return name

    def _named_modules(self, op: str, wanted: Sequence[str] | str | None) -> dict[str, nn.Module]:
        if wanted is None:
            return {}

        def holds(module: nn.Module) -> bool:
            return any(True for _ in module.parameters())

        found = targets.find(op, targets.walk(self.model), wanted, holds, "modules with parameters", "modules_to_save")
        adapted = [entry.path for entry in self.entries if any(f"{entry.path}.".startswith(f"{p}.") for p in found)]
        _checks.require(not adapted, op, "modules_to_save", "name modules without adapters", adapted[:3])
        return found

    def _latest(self, method: str) -> Any:
        return next((entry.module for entry in reversed(self.entries) if entry.method == method), None)

    @property
    def ptuning_embeddings(self) -> Any:
        """The `PTuningEmbedding` that was applied last, or None."""
        return self._latest("ptuning")

    @property
    def prompt_embeddings(self) -> Any:
        """The `PromptEmbedding` that was applied last, or None."""
        return self._latest("prompt_tuning")

    @property
    def prefix_tuning(self) -> Any:
        """The `PrefixTuning` that was applied last, or None."""
        return self._latest("prefix_tuning")

    @property
    def adalora_layers(self) -> dict[str, nn.Module]:
        """{name of the adapted module: its AdaLoRA layer}."""
        return {entry.path: entry.module for entry in self.entries if entry.method == "adalora"}
