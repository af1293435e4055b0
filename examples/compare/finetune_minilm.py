"""Fine-tunes all-MiniLM-L6-v2 on the polarity of movie reviews with LoRA: plain PEFT against it accelerated.

    python examples/compare/finetune_minilm.py    # CPU or, where there is one, the CUDA GPU
    python examples/compare/finetune_minilm.py --dropout 0    # both runs must agree to rounding
    python examples/compare/finetune_minilm.py --model bert-base-uncased --data mine.csv --bf16

One epoch, 252 steps of 32 sentences. Weights and sentences come from two packages of the Python Package Index (see
assets.py). Writes adapter/, summary.json and comparison.png to --output.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from rich.console import Console
from sklearn.linear_model import LogisticRegression
from torch import nn

import _cli
from _compare import compare
from _measure import Scores, evaluate
from _outputs import save, show
from _training import Lora, Task
from fastpeft.cli import assets
from fastpeft.cli.console import progress
from fastpeft.cli.data import Batch, bucketed, labelled_file, movie_reviews


@torch.no_grad()
def embeddings(
    model: nn.Module, batches: list[Batch], task: Task, on_batch: Callable[[], None]
) -> tuple[np.ndarray, Scores]:
    """The frozen model's last hidden state averaged over each row's tokens, fp32 [rows, hidden], and its scores."""
    averages = []

    def average(inputs: Batch, outputs: Any) -> None:
        mask = inputs["attention_mask"]
        summed = (outputs.hidden_states[-1].float() * mask[..., None]).sum(1)
        averages.append((summed / mask.sum(1, keepdim=True)).cpu().numpy())
        on_batch()

    scores = evaluate(model, batches, task.bf16, on_batch=average, output_hidden_states=True)
    return np.concatenate(averages), scores


def baseline(task: Task, out: Console) -> tuple[dict[str, Any], Scores]:
    """What the frozen model is worth: logistic regression on its embeddings; and its own scores before training."""
    model = task.build().to(task.device)
    with progress(out) as bars:
        bar = bars.add_task("frozen embeddings", total=len(task.train) + len(task.test), extra="for the baseline")
        x_train, _ = embeddings(model, task.train, task, lambda: bars.advance(bar))
        x_test, before = embeddings(model, task.test, task, lambda: bars.advance(bar))
    y_train, y_test = (np.concatenate([b["labels"].numpy() for b in batches]) for batches in (task.train, task.test))
    classifier = LogisticRegression(max_iter=2000).fit(x_train, y_train)
    known = {
        "what": "logistic regression on the frozen model's embeddings",
        "accuracy": float(classifier.score(x_test, y_test)),
        "most_frequent_class": float(np.bincount(y_test).max() / len(y_test)),
    }
    return known, before


def make_task(args: argparse.Namespace) -> Task:
    """Fetches or reads what the options name, tokenises once."""
    folder = args.model or str(assets.fetch(assets.MINILM, args.cache))
    if args.data:
        data = labelled_file(args.data, args.seed)
    else:
        data = movie_reviews(assets.fetch(assets.REVIEWS, args.cache) / assets.REVIEWS_FILE, args.seed)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token

    def build() -> nn.Module:
        torch.manual_seed(args.seed)  # the classification head is new: its weights come from the seed
        return transformers.AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=len(data.classes), pad_token_id=tokenizer.pad_token_id, dtype=torch.float32
        )

    batches = bucketed(tokenizer, data.train, args.batch_size, args.max_length, shuffle_seed=args.seed)
    return Task(
        name=f"{Path(folder).name} on {args.data.name if args.data else 'movie reviews'}",
        kind="SEQ_CLS",
        build=build,
        lora=Lora(args.rank, args.alpha, args.dropout),
        train=(batches * args.epochs)[: args.steps],
        test=bucketed(tokenizer, data.test, 2 * args.batch_size, args.max_length),
        learning_rate=args.learning_rate,
        bf16=args.bf16,
        device=torch.device(args.device),
        seed=args.seed,
        output=args.output,
    )


def run(task: Task, out: Console) -> dict[str, Any]:
    """The whole example on one task; returns what it wrote to summary.json."""
    start = time.perf_counter()
    known, before = baseline(task, out)
    summary, _ = compare(task, out, before)
    summary["baseline"] = known
    summary["wall_seconds"] = time.perf_counter() - start
    show(summary, out)
    numbers, picture = save(summary, task.output)
    out.print(
        f"\nWrote {numbers}, {picture} and {task.output / 'adapter'} in {summary['wall_seconds']:.0f} s.",
        soft_wrap=True,
    )
    return summary


def main(arguments: list[str] | None = None) -> int:
    options = _cli.parser(__doc__.splitlines()[0], batch_size=32, max_length=64, learning_rate=1e-3)
    options.add_argument("--epochs", type=int, default=1)
    options.add_argument("--steps", type=int, help="stop after so many; for tests only, too few steps teach nothing")
    args = options.parse_args(arguments)
    out = _cli.prepare(args)
    try:
        task = make_task(args)
    except (assets.AssetError, OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    run(task, out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
