"""Fine-tunes SmolLM2-135M on Shakespeare with LoRA: plain PEFT against it accelerated.

    python examples/compare/finetune_smollm2.py    # 30 steps; CPU or, where there is one, the CUDA GPU
    python examples/compare/finetune_smollm2.py --steps 300 --bf16
    python examples/compare/finetune_smollm2.py --model some/causal-lm --data my_text.txt

A real Llama: 30 layers, 9 query heads on 3 key and value heads, tied embeddings. Trained on Hamlet, King Lear and
Othello, tested on Romeo and Juliet. The baseline is the frozen model. Writes adapter/, summary.json and comparison.png
to --output.
"""

import sys
import time
from typing import Any

from rich.console import Console
from torch import nn

import _cli
from _compare import compare
from _outputs import save, show
from _smollm2 import make_task
from _training import Task
from fastpeft.cli import assets

PROMPT = "Romeo.\nBut, soft! what light through yonder window breaks?\n"


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
    except (assets.AssetError, OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    run(task, tokenizer, args.sample, out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
