"""Texts to batches: labelled sentences for a classifier, running text for a language model."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Batch = dict[str, Tensor]
Row = tuple[list[int], int]


@dataclass(frozen=True)
class Labelled:
    """Sentences and their classes, split once: the same seed gives the same split everywhere."""

    train: list[tuple[str, int]]
    test: list[tuple[str, int]]
    classes: list[str]


def movie_reviews(file: Path, seed: int, test_size: int = 2000) -> Labelled:
    """Polarity of sentences from movie reviews: human ratings from -4 to 4, except those within 0.5 of zero.

    file: tab-separated rows of id, mean rating, sentence. Gives 8,072 sentences to train on and 2,000 to test on.
    """
    rows = [line.split("\t", 2) for line in file.read_text(encoding="utf-8", errors="replace").splitlines()]
    rated = [(text.strip(), float(rating)) for _, rating, text in rows]
    return _split(
        [(text, int(rating > 0)) for text, rating in rated if abs(rating) >= 0.5],
        ["negative", "positive"],
        seed,
        test_size,
    )


def labelled_file(file: Path, seed: int, test_size: int = 2000) -> Labelled:
    """A .tsv, .csv or .jsonl file with a `text` and a `label` column (a header row names them); any number of classes.

    A fifth of the rows, at most `test_size`, is kept for the test.
    Raises ValueError: another kind of file, a column missing, fewer than two classes.
    """
    if file.suffix == ".jsonl":
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    elif file.suffix in (".tsv", ".csv"):
        with file.open(encoding="utf-8", newline="") as handle:
            rows = list(csv.DictReader(handle, delimiter="\t" if file.suffix == ".tsv" else ","))
    else:
        raise ValueError(f"--data: file must end in .tsv, .csv or .jsonl, got {file}")
    if not rows or any("text" not in row or "label" not in row for row in rows):
        raise ValueError(
            f"--data: every row must have the columns text and label, got {sorted(rows[0]) if rows else []}"
        )
    classes = sorted({str(row["label"]) for row in rows})
    if len(classes) < 2:
        raise ValueError(f"--data: label must take two values or more, got {classes}")
    examples = [(row["text"], classes.index(str(row["label"]))) for row in rows]
    return _split(examples, classes, seed, min(test_size, len(examples) // 5))


def _split(examples: list[tuple[str, int]], classes: list[str], seed: int, test_size: int) -> Labelled:
    shuffled = random.Random(seed).sample(examples, len(examples))
    return Labelled(train=shuffled[test_size:], test=shuffled[:test_size], classes=classes)


def bucketed(
    tokenizer: Any,
    examples: Sequence[tuple[str, int]],
    batch_size: int,
    max_length: int,
    shuffle_seed: int | None = None,
) -> list[Batch]:
    """The sentences tokenised, and batches of them as ``length_batches`` makes them."""
    rows = encoded(tokenizer, examples, max_length)
    return length_batches(rows, tokenizer.pad_token_id, batch_size, shuffle_seed)


def encoded(tokenizer: Any, examples: Sequence[tuple[str, int]], max_length: int) -> list[Row]:
    """Token ids and class of every sentence."""
    ids = tokenizer([text for text, _ in examples], truncation=True, max_length=max_length)["input_ids"]
    return list(zip(ids, (label for _, label in examples), strict=True))


def length_batches(rows: Sequence[Row], pad: int, batch_size: int, shuffle_seed: int | None = None) -> list[Batch]:
    """Batches of sentences of similar length, so that little of the work is padding.

    With a seed (training) the batches come in random order and rows that do not fill the last batch are dropped;
    without one (testing) every row is kept. A batch holds input_ids, attention_mask [B, S] and labels [B], all int64.
    """
    rng, rows = random.Random(shuffle_seed), list(rows)
    if shuffle_seed is not None:
        rng.shuffle(rows)
        rows = rows[: len(rows) // batch_size * batch_size] or rows
    rows.sort(key=lambda row: len(row[0]))
    groups = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    if shuffle_seed is not None:
        rng.shuffle(groups)
    return [_pad(group, pad) for group in groups]


def _pad(group: list[Row], pad: int) -> Batch:
    longest = max(len(ids) for ids, _ in group)
    return {
        "input_ids": torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _ in group]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in group]),
        "labels": torch.tensor([label for _, label in group]),
    }


def text_blocks(tokenizer: Any, text: str, length: int) -> Tensor:
    """Running text cut into blocks of `length` tokens: int64 [blocks, length]; an incomplete last block is dropped."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    blocks = len(ids) // length
    if not blocks:
        raise ValueError(f"--data: text must give one block of {length} tokens or more, got {len(ids)} tokens")
    return torch.tensor(ids[: blocks * length]).view(blocks, length)


def block_batches(blocks: Tensor, batch_size: int, steps: int | None = None, seed: int = 0) -> list[Batch]:
    """Language-model batches [B, length]: `steps` of randomly drawn blocks; without `steps`, all blocks in order."""
    if steps is None:
        chosen = list(blocks.split(batch_size))
    else:
        generator = torch.Generator().manual_seed(seed)
        epochs = -(-steps * batch_size // len(blocks))
        order = torch.cat([torch.randperm(len(blocks), generator=generator) for _ in range(epochs)])
        chosen = list(blocks[order[: steps * batch_size]].split(batch_size))
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()} for ids in chosen]
