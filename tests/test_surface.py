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
    "disable_lora",
    "enable_lora",
    "encoder_safe",
    "explain",
    "info",
    "lora_disabled",
    "release_workspace",
    "remask_after",
    "restore",
    "task",
]


@pytest.mark.parametrize("name", NAMES)
def test_name(name):
    assert name in fastpeft.__all__
    assert inspect.getdoc(getattr(fastpeft, name))
