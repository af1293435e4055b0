"""EfficientFineTuningManager, and a function for each of its ``apply_…`` methods."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from fastpeft.manager.checkpointing import Checkpointing
from fastpeft.nn import task


class EfficientFineTuningManager(Checkpointing):
    """Adapts ``model`` in place and keeps account of its adapters.

    model      any nn.Module. The first adapter freezes it; from then on only adapters and the modules named in
               ``modules_to_save`` are trained. ``manager.model`` is the same object
    Every ``apply_…`` returns the manager and takes, besides the options of its class:
        target_modules    a name or several: of a module, the end of its dotted name, or a regular expression for the
                          whole of it; a container means what it holds. None: every linear layer but the head
        adapter_name      default: the method's name, numbered if taken. Updates of adapters on one module add up
        modules_to_save   names of modules, such as a head, that are fully trained and saved too; they get no adapter
    ``self_attn.out_proj`` of an nn.MultiheadAttention, which torch reads and never calls, is called from then on, and
    torch's encoders do not take their fast path, which would skip adapters.
    Raises     TypeError: no module, or an unknown option.  ValueError: targets that match nothing, a range, a taken
               name, and what the classes refuse. The model is then unchanged.
    """

    def task(self, condition: Any) -> AbstractContextManager[None]:
        """``with manager.task(ids):`` gives task ids, or embeddings, to every conditional or hyper LoRA called inside.
        A backward pass that recomputes belongs inside too."""
        return task(condition)


def _to_model(name: str) -> Callable[..., EfficientFineTuningManager]:
    method = getattr(EfficientFineTuningManager, name)

    def function(model: nn.Module, *args: Any, **options: Any) -> EfficientFineTuningManager:
        manager: EfficientFineTuningManager = method(EfficientFineTuningManager(model), *args, **options)
        return manager

    function.__name__ = function.__qualname__ = f"{name}_to_model"
    doc = inspect.getdoc(method)
    function.__doc__ = f"``EfficientFineTuningManager(model).{name}(…)``; returns the manager.\n\n{doc}"
    own = [each for each in inspect.signature(method).parameters.values() if each.name != "self"]
    first = inspect.Parameter("model", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    function.__signature__ = inspect.Signature([first, *own])  # type: ignore[attr-defined]
    return function


apply_lora_to_model = _to_model("apply_lora")
apply_qlora_to_model = _to_model("apply_qlora")
apply_adalora_to_model = _to_model("apply_adalora")
apply_sparse_lora_to_model = _to_model("apply_sparse_lora")
apply_pruning_lora_to_model = _to_model("apply_pruning_lora")
apply_conditional_lora_to_model = _to_model("apply_conditional_lora")
apply_hyper_lora_to_model = _to_model("apply_hyper_lora")
apply_attention_guided_lora_to_model = _to_model("apply_attention_guided_lora")
apply_adapter_to_model = _to_model("apply_adapter")
apply_ptuning_to_model = _to_model("apply_ptuning")
apply_prompt_tuning_to_model = _to_model("apply_prompt_tuning")
apply_prefix_tuning_to_model = _to_model("apply_prefix_tuning")
