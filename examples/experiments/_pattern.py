"""PET: the polarity of a review as a word that a language model fills in, with few examples.

Pattern-exploiting training (Schick and Schütze 2021) asks a model that predicts words: "<review> All in all, the film
was ___". all-MiniLM-L6-v2 was trained for sentence embeddings and has no head that predicts words, so that SmolLM2-135M
answers here: what comes after the pattern, "bad" or "good". Before any training that is a guess without examples; then
LoRA learns from 256 sentences where the other methods see 8,072.
"""

import argparse
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from _experiment import Experiment, Frozen, adamw, counts, drawn_batches
from _reviews import Reviews, accuracy
from _tiny import tiny_llama
from fastpeft import EfficientFineTuningManager, PatternVerbalizer
from fastpeft.cli.console import progress
from fastpeft.cli.measure import kept_for_backward, precision
from fastpeft.cli.smollm2 import smollm2

PATTERN = "{text} All in all, the film was {mask}"
WORDS = {"negative": ["bad", "terrible"], "positive": ["good", "great"]}
FEW, TESTED, BATCH = 256, 500, 8


def model_and_verbalizer(args: argparse.Namespace, task: Reviews) -> tuple[nn.Module, PatternVerbalizer]:
    torch.manual_seed(args.seed)
    if args.quick:
        return tiny_llama().eval(), PatternVerbalizer(task.tokenizer, "{text} it was {mask}", WORDS)
    folder = smollm2(args.cache)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), PatternVerbalizer(tokenizer, PATTERN, WORDS)


def scores(model: nn.Module, verbalizer: PatternVerbalizer, inputs: Any) -> Tensor:
    """The labels' scores; the large vocabulary is asked at each example's answer alone."""
    hidden = model.base_model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])[0]
    answers = hidden[torch.arange(len(hidden)), verbalizer.positions(inputs)]
    return verbalizer.scores(model.lm_head(answers), inputs)


@torch.no_grad()
def tested(
    this: Experiment, what: str, model: nn.Module, verbalizer: PatternVerbalizer, rows: list, bf16: bool
) -> float:
    model.eval()
    said, batches = [], []
    with progress(this.out) as bars:
        bar = bars.add_task(what, total=len(rows), extra="")
        for start in range(0, len(rows), 25):
            texts, labels = zip(*rows[start : start + 25], strict=True)
            inputs = verbalizer.encode(texts, truncation=True, max_length=96)
            with precision(torch.device("cpu"), bf16):
                said.append(scores(model, verbalizer, inputs))
            batches.append({"labels": torch.tensor(labels)})
            bars.update(bar, advance=len(texts), extra=f"accuracy {accuracy(said, batches):.1%}")
    return accuracy(said, batches)


def tune(this: Experiment, task: Reviews) -> dict[str, Any]:
    """Asked without training, then after LoRA on a few sentences; the row of the table."""
    model, verbalizer = model_and_verbalizer(this.args, task)
    few, rows = task.data.train[:FEW], sorted(task.data.test[:TESTED], key=lambda row: len(row[0]))
    before = tested(this, "pattern: before", model, verbalizer, rows, task.bf16)
    manager = EfficientFineTuningManager(model).apply_lora(rank=8, alpha=16)
    (trained, total), frozen = counts(model), Frozen(model)
    epochs = 1 if this.args.quick else 2
    drawn = drawn_batches(len(few), BATCH, epochs * len(few) // BATCH, this.args.seed)

    def loss(rows: Tensor) -> Tensor:
        texts, labels = zip(*(few[row] for row in rows), strict=True)
        inputs = verbalizer.encode(texts, truncation=True, max_length=96)
        return nn.functional.cross_entropy(scores(model, verbalizer, inputs).float(), torch.tensor(labels))

    kept = kept_for_backward(model.train(), lambda: loss(drawn[0]))
    trace = this.train("pattern", drawn, loss, adamw(model, 5e-4), bf16=task.bf16)
    return {
        "what": f"PET, SmolLM2 and LoRA, {len(few)} sentences",
        "trainable": trained,
        "trainable_after": manager.count_trainable_parameters(),
        "parameters": total,
        "frozen_values_bit_equal": frozen.check(),
        "accuracy_before": before,
        "accuracy": tested(this, "pattern: after", model, verbalizer, rows, task.bf16),
        "kept_for_backward_bytes": kept,
        "note": f"tested on {len(rows)} sentences",
        **trace,
    }
