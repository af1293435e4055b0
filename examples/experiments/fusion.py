"""AdapterFusion in its two stages: adapters of three sources, then what they know together for a fourth.

    python examples/experiments/fusion.py

all-MiniLM-L6-v2 stays frozen. Stage one trains an adapter of Pfeiffer's kind and a head on the polarity of sentences of
each of movie reviews, product reviews and tweets. Stage two freezes the three adapters and trains on 1,000 sentences of
newspaper editorials: the fusion's query, key and value at the six places, and a head. Beside it, on the same sentences:
a head alone, and a new adapter with its head. The head is linear on the mean over the tokens. The plot shows how much
each source is listened to at each place.
"""

import argparse
import random
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from _experiment import AFTER, Experiment, Frozen, counts, options, run
from _reviews import MAX_LENGTH, accuracy, minilm, predict, rated, text_options
from _tiny import sentences
from fastpeft import Adapter, AdapterFusion, EfficientFineTuningManager
from fastpeft.cli import assets
from fastpeft.cli.data import Batch, bucketed

SOURCES = ("movies", "products", "tweets")
TARGET = "editorials"
FILES = {"products": "amazonReviewSnippets", "tweets": "tweets", "editorials": "nytEditorialSnippets"}
BOTTLENECK = 24
Rows = list[tuple[str, int]]


class Output(NamedTuple):
    """As transformers': a classifier's loss and logits."""

    loss: Tensor | None
    logits: Tensor


class MeanPooled(nn.Module):
    """A linear head on the mean of an encoder's last hidden states."""

    def __init__(self, encoder: nn.Module, width: int) -> None:
        super().__init__()
        self.encoder, self.classifier = encoder, nn.Linear(width, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Output:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask.unsqueeze(-1).to(hidden.dtype)
        logits = self.classifier(((hidden * weights).sum(1) / weights.sum(1)).to(self.classifier.weight.dtype))
        loss = None if labels is None else nn.functional.cross_entropy(logits.float(), labels)
        return Output(loss, logits)


class Fusion:
    """What the two stages share: how to build, what to train and test on."""

    def __init__(self, this: Experiment, args: argparse.Namespace) -> None:
        self.this, self.args = this, args
        self.build_bert, self.tokenizer = minilm(args)
        self.data = {name: self.read(name) for name in (*SOURCES, TARGET)}

    def read(self, name: str) -> tuple[list[Batch], list[Batch]]:
        """Batches to train and to test on."""
        if self.args.quick:
            train, test = sentences(64, len(name)), sentences(32, 99)
        else:
            if name == "movies":
                file = assets.fetch(assets.REVIEWS, self.args.cache) / assets.REVIEWS_FILE
            else:
                file = assets.fetch(assets.OTHER_REVIEWS, self.args.cache) / f"{FILES[name]}_GroundTruth.txt"
            rows = random.Random(self.args.seed).sample(every := rated(file), len(every))
            most, held_out = (1000, 1000) if name == TARGET else (3000, 500)
            train, test = rows[held_out:][:most], rows[:held_out]
        epochs = self.args.epochs * (2 if name == TARGET else 1)
        batches = bucketed(self.tokenizer, train, self.args.batch_size, MAX_LENGTH, shuffle_seed=self.args.seed)
        return batches * epochs, bucketed(self.tokenizer, test, 50, MAX_LENGTH)

    def build(self) -> MeanPooled:
        """The frozen encoder with a new head."""
        encoder = self.build_bert().base_model.requires_grad_(False)
        return MeanPooled(encoder, encoder.config.hidden_size).eval()

    def fit(self, what: str, task: str, model: MeanPooled) -> dict[str, Any]:
        """Trains what requires gradients, the head ten times as fast, and tests."""
        train, test = self.data[task]
        (trained, total), frozen = counts(model), Frozen(model)
        head = list(model.classifier.parameters())
        rest = [p for p in model.parameters() if p.requires_grad and all(p is not each for each in head)]
        groups = [{"params": head, "lr": 1e-2}, *([{"params": rest, "lr": 1e-3}] if rest else [])]
        model.train()
        trace = self.this.train(
            what, train, lambda batch: model(**batch).loss, torch.optim.AdamW(groups), bf16=self.args.bf16
        )
        scored = accuracy(predict(self.this, f"{what}: test", model, test, self.args.bf16), test)
        result = {"task": task, "trainable": trained, "parameters": total, "accuracy": scored}
        return {**result, "frozen_values_bit_equal": frozen.check(), **trace}


def with_adapter(model: MeanPooled) -> dict[str, Adapter]:
    """An adapter behind each feed-forward layer, by its place; the head is trained along."""
    manager = EfficientFineTuningManager(model)
    manager.apply_adapter(bottleneck=BOTTLENECK, kind="pfeiffer", modules_to_save=["classifier"])
    return {entry.path: entry.module for entry in manager.entries}


def with_fusion(model: MeanPooled, adapters: dict[str, dict[str, Adapter]]) -> dict[str, AdapterFusion]:
    """The fusion of the sources' adapters at each place where they were."""
    fusions = {}
    for place in next(iter(adapters.values())):
        layer = model.get_submodule(place)
        fusions[place] = AdapterFusion(layer.out_features, [by_place[place] for by_place in adapters.values()])
        model.set_submodule(place, nn.Sequential(layer, fusions[place]))
    return fusions


@torch.no_grad()
def listened(model: nn.Module, fusions: dict[str, AdapterFusion], batches: list[Batch]) -> list[list[float]]:
    """Each source's mean share of the attention over real tokens, [places, sources]."""
    shares: dict[str, list[Tensor]] = {place: [] for place in fusions}
    mask = batches[0]["attention_mask"].bool()

    def look(place: str, fusion: AdapterFusion) -> Callable[[Any, Any], None]:
        def hook(module: Any, args: Any) -> None:
            x = args[0]
            keys = torch.stack([fusion.key(adapter.delta(x)) for adapter in fusion.adapters], dim=-2)
            weights = (keys * fusion.query(x).unsqueeze(-2)).sum(-1).softmax(-1)
            shares[place].append(weights[mask])

        return hook

    hooks = [fusion.register_forward_pre_hook(look(place, fusion)) for place, fusion in fusions.items()]
    for batch in batches:
        mask = batch["attention_mask"].bool()
        model(**batch)
    for hook in hooks:
        hook.remove()
    return [torch.cat(parts).mean(0).tolist() for parts in shares.values()]


def fusion(arguments: Sequence[str] | None = None) -> None:
    parser = options(__doc__.splitlines()[0])
    text_options(parser)
    args = parser.parse_args(arguments)
    this = Experiment("fusion", args)
    both, rows, adapters = Fusion(this, args), {}, {}
    for source in SOURCES:
        model = both.build()
        adapters[source] = with_adapter(model)
        rows[source] = {"what": "adapter, stage one", **both.fit(source, source, model)}
    before = {name: p.clone() for source in SOURCES for name, p in named(source, adapters[source])}

    rows["head"] = {"what": "head only", **both.fit("head", TARGET, both.build())}
    model = both.build()
    with_adapter(model)
    rows["adapter"] = {"what": "a new adapter", **both.fit("adapter", TARGET, model)}
    model = both.build()
    fusions = with_fusion(model, adapters)
    rows["fusion"] = {"what": "fusion of three, stage two", **both.fit("fusion", TARGET, model)}
    shares = listened(model, fusions, both.data[TARGET][1][::4])
    now = dict(each for source in SOURCES for each in named(source, adapters[source]))
    same = all(torch.equal(now[name], then) for name, then in before.items())

    this.table(
        "Polarity of sentences, MiniLM frozen",
        ["", "task", "trained", "accuracy", "training, CPU"],
        [
            [row["what"], row["task"], f"{row['trainable']:,}", f"{row['accuracy']:.1%}", f"{row['cpu_seconds']:.0f} s"]
            for row in rows.values()
        ],
    )
    values = sum(p.numel() for p in before.values())
    this.say(f"The {values:,} values of the three adapters {'kept' if same else 'LOST'} every bit in stage two.")
    average = [sum(place[index] for place in shares) / len(shares) for index in range(len(SOURCES))]
    this.say("Listened to: " + ", ".join(f"{s} {share:.0%}" for s, share in zip(SOURCES, average, strict=True)) + ".")

    def draw(figure: Any) -> None:
        bars, heat = figure.subplots(1, 2)
        names = ("head", "adapter", "fusion")
        drawn = bars.bar(names, [100 * rows[name]["accuracy"] for name in names], color=AFTER)
        bars.bar_label(drawn, fmt="%.1f")
        bars.set(ylabel="accuracy on editorials [%]", ylim=(50, 100))
        heat.imshow(shares, vmin=0, vmax=1, cmap="Blues", aspect="auto")
        for place, row in enumerate(shares):
            for index, share in enumerate(row):
                colour = "white" if share > 0.6 else "black"
                heat.text(index, place, f"{share:.2f}", ha="center", va="center", color=colour, fontsize=8)
        heat.set(xticks=range(len(SOURCES)), xticklabels=SOURCES, yticks=range(len(shares)), ylabel="layer")
        heat.set_title("share of the attention", fontsize=10)

    found = {"methods": rows, "listened": shares, "adapters_bit_equal_in_stage_two": same}
    this.finish(found, draw, figsize=(8, 3.5))


def named(source: str, by_place: dict[str, Adapter]) -> list[tuple[str, Tensor]]:
    return [(f"{source}.{place}.{n}", p) for place, one in by_place.items() for n, p in one.named_parameters()]


if __name__ == "__main__":
    sys.exit(run(fusion))
