"""all-MiniLM-L6-v2 and rated sentences: the task of the experiments on sentiment."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from _experiment import Experiment
from _tiny import sentences, tiny_bert, word_tokenizer
from fastpeft.cli import assets
from fastpeft.cli.console import progress
from fastpeft.cli.data import Batch, Labelled, bucketed, movie_reviews
from fastpeft.cli.measure import precision

MAX_LENGTH = 64


@dataclass(frozen=True)
class Reviews:
    """A frozen encoder with a new head, and what it is trained and tested on."""

    build: Callable[[], nn.Module]  # the same weights at each call
    tokenizer: Any
    data: Labelled
    train: list[Batch]
    test: list[Batch]
    bf16: bool


def text_options(parser: argparse.ArgumentParser) -> None:
    """The options of the experiments on texts."""
    parser.add_argument("--bf16", action="store_true", help="compute under autocast to bf16 instead of in fp32")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=32)


def minilm(args: argparse.Namespace) -> tuple[Callable[[], nn.Module], Any]:
    """How to build MiniLM with a new head for two classes, and its tokenizer."""
    transformers.logging.set_verbosity_error()  # it warns of a new classification head, which is what is trained here
    transformers.logging.disable_progress_bar()
    folder = None if args.quick else str(assets.fetch(assets.MINILM, args.cache))

    def build() -> nn.Module:
        torch.manual_seed(args.seed)  # the classification head is new: its weights come from the seed
        if folder is None:
            return tiny_bert().eval()
        kind = transformers.AutoModelForSequenceClassification
        return kind.from_pretrained(folder, num_labels=2, dtype=torch.float32)

    return build, word_tokenizer() if folder is None else transformers.AutoTokenizer.from_pretrained(folder)


def reviews(args: argparse.Namespace) -> Reviews:
    """Movie reviews: 8,072 sentences to train on, 2,000 to test on, half of them positive."""
    build, tokenizer = minilm(args)
    if args.quick:
        data = Labelled(train=sentences(128), test=sentences(64, 1), classes=["negative", "positive"])
    else:
        data = movie_reviews(assets.fetch(assets.REVIEWS, args.cache) / assets.REVIEWS_FILE, args.seed)
    train = bucketed(tokenizer, data.train, args.batch_size, MAX_LENGTH, shuffle_seed=args.seed) * args.epochs
    return Reviews(build, tokenizer, data, train, bucketed(tokenizer, data.test, 50, MAX_LENGTH), args.bf16)


@torch.no_grad()
def predict(this: Experiment, what: str, model: nn.Module, batches: Sequence[Batch], bf16: bool) -> list[Tensor]:
    """The logits of every batch in eval mode, under a progress bar."""
    model.eval()
    logits = []
    with progress(this.out) as bars:
        bar = bars.add_task(what, total=len(batches), extra="")
        right = rows = 0
        for batch in batches:
            inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
            with precision(torch.device("cpu"), bf16):
                logits.append(model(**inputs).logits.float())
            right += int((logits[-1].argmax(-1) == batch["labels"]).sum())
            rows += len(batch["labels"])
            bars.update(bar, advance=1, extra=f"accuracy {right / rows:.1%}")
    return logits


def accuracy(logits: Sequence[Tensor], batches: Sequence[Batch]) -> float:
    """Share of rows that are classified right."""
    right = sum(int((each.argmax(-1) == batch["labels"]).sum()) for each, batch in zip(logits, batches, strict=True))
    return right / sum(len(batch["labels"]) for batch in batches)


def rated(file: Path) -> list[tuple[str, int]]:
    """(sentence, 1 if rated above zero), those nearer to zero than 0.5 left out; any of the collection's files."""
    rows = [line.split("\t", 2) for line in file.read_text(encoding="utf-8", errors="replace").splitlines()]
    return [(text.strip(), int(float(rating) > 0)) for _, rating, text in rows if abs(float(rating)) >= 0.5]
