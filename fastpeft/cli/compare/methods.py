"""The compared methods: how each is put into a model, its options, and the reason for its learning rate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fastpeft.cli.compare.adapted import Adapted, adalora, peft_lora, pruned, sparsity
from fastpeft.cli.compare.task import Task
from fastpeft.manager import EfficientFineTuningManager
from fastpeft.ops import _checks

Options = dict[str, Any]


@dataclass(frozen=True)
class Method:
    """One method.

    put        put(model, task, options, steps) -> Adapted; trains nothing but the method's own parameters and the head
    rate       default learning rate
    why        where that rate comes from
    options    its other options, with their defaults
    virtual    whether it needs a model of transformers that reads token ids
    """

    put: Callable[[nn.Module, Task, Options, int], Adapted]
    rate: float
    why: str
    options: Mapping[str, Any] = field(default_factory=dict)
    virtual: bool = False


def _manager(model: nn.Module, word: str, task: Task, **options: Any) -> EfficientFineTuningManager:
    """Call ``apply_…`` of the manager; the head is trained too."""
    manager = EfficientFineTuningManager(model)
    applied: EfficientFineTuningManager = getattr(manager, f"apply_{word}")(
        modules_to_save=list(task.head) or None, **options
    )
    return applied


def _low_rank(options: Options) -> Options:
    """Rank, scaling and dropout of a LoRA; alpha defaults to twice the rank, so the update's scale stays 2."""
    alpha = 2.0 * options["rank"] if options["alpha"] is None else options["alpha"]
    return {"rank": options["rank"], "alpha": alpha, "dropout_probability": options["dropout"]}


def _lora(model: nn.Module, task: Task, options: Options, steps: int) -> Adapted:
    _manager(model, "lora", task, target_modules=task.names(model), **_low_rank(options))
    return Adapted(model)


def _qlora(model: nn.Module, task: Task, options: Options, steps: int) -> Adapted:
    given = _low_rank(options) | {"quant_type": options["quant_type"]}
    _manager(model, "qlora", task, target_modules=task.names(model), **given)
    return Adapted(model)


def _adalora(model: nn.Module, task: Task, options: Options, steps: int) -> Adapted:
    _manager(model, "adalora", task, target_modules=task.names(model), form="svd", **_low_rank(options))
    return adalora(model, options["target_rank"], options["orthogonality"], steps)


def _sparse(model: nn.Module, task: Task, options: Options, steps: int) -> Adapted:
    given = _low_rank(options) | {"sparsity": options["sparsity"], "pattern": options["pattern"]}
    _manager(model, "sparse_lora", task, target_modules=task.names(model), **given)
    return Adapted(model, about=lambda: sparsity(model))


def _pruned(model: nn.Module, task: Task, options: Options, steps: int) -> Adapted:
    given = _low_rank(options) | {"prune_rate": options["prune_rate"], "score": options["score"]}
    _manager(model, "pruning_lora", task, target_modules=task.names(model), **given)
    return pruned(model, options["prune_rate"], steps)


def _guided(model: nn.Module, task: Task, options: Options, steps: int) -> Adapted:
    given = _low_rank(options) | {"gate": options["gate"], "gate_scale": float(options["rank"])}
    _manager(model, "attention_guided_lora", task, target_modules=task.names(model), **given)
    return Adapted(model)


def _adapter(model: nn.Module, task: Task, options: Options, steps: int) -> Adapted:
    given = {"bottleneck": options["bottleneck"], "kind": options["kind"]}
    targets = None if task.adapter_targets is None else list(task.adapter_targets)
    _manager(model, "adapter", task, target_modules=targets, **given)
    return Adapted(model)


def _start(task: Task) -> Options:
    """Virtual tokens start from the task's real ones, if it has any."""
    first = task.first_tokens
    return {} if first is None else {"init": "text", "text": "", "tokenizer": lambda text: first}


def _prompt(model: nn.Module, task: Task, options: Options, steps: int) -> Adapted:
    _manager(model, "prompt_tuning", task, num_virtual_tokens=options["tokens"], **_start(task))
    return Adapted(model)


def _p_tuning(model: nn.Module, task: Task, options: Options, steps: int) -> Adapted:
    given = {"hidden_dimension": options["hidden"], "dropout_probability": options["dropout"]}
    _manager(model, "ptuning", task, num_virtual_tokens=options["tokens"], **given)
    return Adapted(model)


def _prefix(model: nn.Module, task: Task, options: Options, steps: int) -> Adapted:
    given = {"prefix_length": options["tokens"], "dropout_probability": options["dropout"]}
    _manager(model, "prefix_tuning", task, **given, **_start(task))
    return Adapted(model)


def _head(model: nn.Module, task: Task, options: Options, steps: int) -> Adapted:
    _checks.require(bool(task.head), "compare", "method head", "have a head to train", f"none in {task.name}")
    model.requires_grad_(False)
    for name in task.head:
        model.get_submodule(name).requires_grad_(True)
    return Adapted(model)


def _full(model: nn.Module, task: Task, options: Options, steps: int) -> Adapted:
    model.requires_grad_(True)
    return Adapted(model)


def _none(model: nn.Module, task: Task, options: Options, steps: int) -> Adapted:
    model.requires_grad_(False)
    return Adapted(model)


def _peft(model: nn.Module, task: Task, options: Options, steps: int) -> Adapted:
    return Adapted(peft_lora(model, task, _low_rank(options)))


def _accelerated(model: nn.Module, task: Task, options: Options, steps: int) -> Adapted:
    from fastpeft.integrations.peft import accelerate

    adapted = peft_lora(model, task, _low_rank(options))
    accelerate(adapted)
    return Adapted(adapted)


_LORA: Options = {"rank": 8, "alpha": None, "dropout": 0.1}
_LIKE_LORA = "as LoRA, whose factors it has"

METHODS: dict[str, Method] = {
    "lora": Method(_lora, 1e-3, "upper end of 1e-4 to 1e-3 (Hu et al. 2021; PEFT's examples): a small model", _LORA),
    "qlora": Method(
        _qlora, 1e-3, "as LoRA: only the frozen weights differ (Dettmers et al. 2023)", _LORA | {"quant_type": "nf4"}
    ),
    "adalora": Method(
        _adalora, 2e-3, "upper end of 5e-4 to 2e-3 (Zhang et al. 2023): its gains start at zero and move first",
        {"rank": 12, "alpha": None, "dropout": 0.1, "target_rank": 8, "orthogonality": 0.1},
    ),
    "sparse": Method(_sparse, 1e-3, _LIKE_LORA, _LORA | {"sparsity": 0.5, "pattern": "random"}),
    "pruned": Method(_pruned, 1e-3, _LIKE_LORA, _LORA | {"prune_rate": 0.5, "score": "magnitude"}),
    "attention-guided": Method(_guided, 1e-3, _LIKE_LORA, _LORA | {"gate": "softmax"}),
    "adapter": Method(
        _adapter, 1e-3, "between 1e-4 and 3e-3 (Houlsby et al. 2019)", {"bottleneck": 24, "kind": "houlsby"}
    ),
    "prompt": Method(
        _prompt, 3e-2, "few parameters far from the loss take large steps (Lester et al. 2021 use 0.3)",
        {"tokens": 20}, virtual=True,
    ),
    "p-tuning": Method(
        _p_tuning, 3e-3, "its network is trained like any network from random numbers (Liu et al. 2021)",
        {"tokens": 20, "hidden": None, "dropout": 0.0}, virtual=True,
    ),
    "prefix": Method(
        _prefix, 1e-2, "5e-3 to 1e-2 without a projection (Liu et al. 2022, P-tuning v2)",
        {"tokens": 20, "dropout": 0.0}, virtual=True,
    ),
    "head": Method(_head, 1e-2, "a linear classifier by itself takes larger steps than one beside an adapter"),
    "full": Method(_full, 5e-5, "usual for all weights of a BERT (Devlin et al. 2019: 2e-5 to 5e-5)"),
    "none": Method(_none, 0.0, "nothing is trained: the model as it is"),
    "peft-lora": Method(_peft, 1e-3, "as LoRA", _LORA),
    "peft-lora-accelerated": Method(_accelerated, 1e-3, "as LoRA", _LORA),
}  # fmt: skip


def rate(name: str, task: Task, options: Options) -> float:
    """The learning rate: the requested one, else the task's, else the method's."""
    if options.get("lr") is not None:
        return float(options["lr"])
    return task.rates.get(name, METHODS[name].rate)


def put(name: str, model: nn.Module, task: Task, options: Options, steps: int) -> Adapted:
    """Put a method into ``model``.

    options    override its defaults
    Raises     ValueError: a model that the method does not support, and as the method's own classes do.
    """
    method = METHODS[name]
    served = not method.virtual or hasattr(model, "get_input_embeddings")
    _checks.require(served, "compare", f"method {name}", "have a model of transformers", type(model).__name__)
    given = dict(method.options) | {key: value for key, value in options.items() if key != "lr"}
    adapted = method.put(model, task, given, steps)
    trained = sum(p.numel() for p in adapted.model.parameters() if p.requires_grad)
    _checks.require(bool(trained) or name == "none", "compare", f"method {name}", "train something", "no parameter")
    return adapted


def groups(name: str, adapted: Adapted, task: Task, options: Options) -> list[dict[str, Any]]:
    """Two groups for an optimizer: the method's own parameters, and the head's, whose rate is the same in all methods
    except the one that trains only the head."""
    own = rate(name, task, options)
    parts: dict[bool, list[nn.Parameter]] = {False: [], True: []}
    for path, parameter in adapted.model.named_parameters():
        if parameter.requires_grad:
            parts[any(f".{head}." in f".{path}" for head in task.head)].append(parameter)
    made = [
        {"params": parts[False], "lr": own},
        {"params": parts[True], "lr": own if name == "head" else task.head_rate},
    ]
    return [group for group in made if group["params"]]
