"""The manager: adapters put into a model by name, counted, switched, saved, loaded, merged and taken out.

``targets`` says which modules are meant, ``defaults`` which where none is named; ``methods`` which class adapts a
module; ``placing`` puts in and takes out, all or nothing; ``prompts`` is the same for virtual tokens. The manager is
one class in several files, each the base of the next: ``account``, ``applying``, ``merging``, ``saving`` (over
``archive`` and ``options``), ``words``, ``checkpointing``, ``manager``. ``exchange`` is the formats of other libraries,
from a manager (``outgoing``) and into one (``incoming``). No arithmetic of an adapter, and no format of a file, may
enter here.
"""

from fastpeft.manager.exchange import load_adapter, save_adapter
from fastpeft.manager.manager import (
    EfficientFineTuningManager,
    apply_adalora_to_model,
    apply_adapter_to_model,
    apply_attention_guided_lora_to_model,
    apply_conditional_lora_to_model,
    apply_hyper_lora_to_model,
    apply_lora_to_model,
    apply_prefix_tuning_to_model,
    apply_prompt_tuning_to_model,
    apply_pruning_lora_to_model,
    apply_ptuning_to_model,
    apply_qlora_to_model,
    apply_sparse_lora_to_model,
)
from fastpeft.manager.sharing import share_lora

__all__ = [
    "EfficientFineTuningManager",
    "apply_adalora_to_model",
    "apply_adapter_to_model",
    "apply_attention_guided_lora_to_model",
    "apply_conditional_lora_to_model",
    "apply_hyper_lora_to_model",
    "apply_lora_to_model",
    "apply_prefix_tuning_to_model",
    "apply_prompt_tuning_to_model",
    "apply_pruning_lora_to_model",
    "apply_ptuning_to_model",
    "apply_qlora_to_model",
    "apply_sparse_lora_to_model",
    "load_adapter",
    "save_adapter",
    "share_lora",
]
