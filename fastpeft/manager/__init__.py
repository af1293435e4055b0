"""The manager: adapters put into a model by name, counted, switched, saved, loaded, merged and taken out.

``targets`` resolves names to modules, ``defaults`` chooses modules if none are named, ``methods`` says which class
adapts a module; ``placing`` puts adapters in and takes them out, all or none; ``prompts`` does so for virtual tokens.
The manager is one class in several files, each the base of the next: ``account``, ``applying``, ``merging``, ``saving``
(over ``archive`` and ``options``), ``words``, ``checkpointing``, ``manager``. ``exchange`` converts to other libraries'
formats (``outgoing``) and from them (``incoming``). An adapter's arithmetic and file formats do not belong here.
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
