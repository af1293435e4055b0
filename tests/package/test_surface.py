"""The names that fastpeft owes (the documents' and its own), all importable from the top, in order, and documented."""

import inspect
import re
from pathlib import Path

import pytest

import fastpeft

NAMES = [
    "AccelerateCallback",
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
    "patch",
    "release_workspace",
    "remask_after",
    "restore",
    "share_lora",
    "task",
    "unpatch",
]


@pytest.mark.parametrize("name", NAMES)
def test_name(name):
    assert name in fastpeft.__all__
    assert inspect.getdoc(getattr(fastpeft, name))


def test_every_decision_has_a_test():
    """The 43 decisions on what the documents leave undefined or get wrong, each in its document's module."""
    found = {}
    for path in (Path(__file__).parents[1] / "documents").glob("test_s[0-4]_*.py"):
        found |= {int(number): path.name for number in re.findall(r"def test_decision_(\d+)_", path.read_text())}
    assert sorted(found) == list(range(1, 44))
    first = {"test_s0_manager.py": 1, "test_s1_peft_notes.py": 17, "test_s2_from_scratch.py": 21,
             "test_s3_prompts.py": 29, "test_s4_variants.py": 32}  # fmt: skip
    assert all(found[number] == max((n, name) for name, n in first.items() if n <= number)[1] for number in found)
