"""The names that fastpeft owes (the documents' and its own), all importable from the top, in order, and documented."""

import inspect

import pytest

import fastpeft

NAMES = [
    "AdaLoRALayer",
    "AdaLoRALinear",
    "Adapter",
    "AdapterFusion",
    "AttentionGuidedLoRALayer",
    "AttentionGuidedLoRALinear",
    "ConditionalLoRALayer",
    "ConditionalLoRALinear",
    "EfficientFineTuningManager",
    "HyperLoRALayer",
    "HyperLoRALinear",
    "LoRAGRU",
    "LoRAGRUCell",
    "LoRALSTM",
    "LoRALSTMCell",
    "LoRALayer",
    "LoRALinear",
    "LoRAMultiheadAttention",
    "LoRAParametrization",
    "LoRARNN",
    "LoRARNNCell",
    "PruningAwareLoRALayer",
    "PruningAwareLoRALinear",
    "QLoRALinear",
    "RankAllocator",
    "SparseLoRALayer",
    "SparseLoRALinear",
    "accelerate",
    "add_parametrization",
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
    "disable_lora",
    "enable_lora",
    "encoder_safe",
    "explain",
    "info",
    "lora_disabled",
    "release_workspace",
    "remask_after",
    "restore",
    "share_lora",
    "task",
]


@pytest.mark.parametrize("name", NAMES)
def test_name(name):
    assert name in fastpeft.__all__
    assert inspect.getdoc(getattr(fastpeft, name))
