"""An LSTM that knows five speakers, adapted to nine with LoRA on its weights: JapaneseVowels.

    python examples/experiments/speech.py

Trains LSTM(12, 128) to tell speakers 1 to 5 apart by how they say two vowels, freezes it and adapts it to all nine:
with a new head alone, with LoRA of rank 4 on its input and recurrent weights and the head, and, as the bound, by
training everything. 270 utterances of 7 to 29 frames to train on, 370 to test.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_sequence

from _experiment import AFTER, BEFORE, OTHER, Experiment, Frozen, adamw, counts, drawn_batches, options, run
from fastpeft import EfficientFineTuningManager, freeze_body
from fastpeft.cli import assets

KNOWN = 5  # speakers that the LSTM is trained on first
METHODS = {"head": "head only", "lora": "LoRA r 4 and head", "full": "everything trained"}
Utterances = tuple[list[Tensor], Tensor]


class Recogniser(nn.Module):
    """The last hidden state of an LSTM over the frames, and a head."""

    def __init__(self, channels: int, hidden: int, speakers: int) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(channels, hidden, batch_first=True), nn.Linear(hidden, speakers)

    def forward(self, utterances: list[Tensor]) -> Tensor:
        lengths = torch.tensor([len(each) for each in utterances])
        padded = pad_sequence(utterances, batch_first=True)
        _, (hidden, _) = self.lstm(pack_padded_sequence(padded, lengths, batch_first=True, enforce_sorted=False))
        return self.head(hidden[-1])


def vowels(file: Path) -> Utterances:
    """Frames [T, 12] of each utterance and its speaker from 0; a line holds the channels and the class."""
    rows = [line for line in file.read_text().splitlines() if line and line[0] not in "#%@"]
    utterances, speakers = [], []
    for row in rows:
        *channels, speaker = row.split(":")
        utterances.append(torch.tensor([[float(value) for value in channel.split(",")] for channel in channels]).T)
        speakers.append(int(speaker) - 1)
    return utterances, torch.tensor(speakers)


def made_up(count: int, seed: int) -> Utterances:
    """Nine speakers who differ in the mean of their frames."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(9, 12, generator=torch.Generator().manual_seed(0))
    speakers = torch.arange(count) % 9
    return [means[s] + torch.randn(7 + i % 5, 12, generator=generator) for i, s in enumerate(speakers)], speakers


@torch.no_grad()
def accuracy(model: nn.Module, data: Utterances) -> float:
    return float((model(data[0]).argmax(-1) == data[1]).float().mean())


def fit(this: Experiment, what: str, model: nn.Module, data: Utterances, rate: float, epochs: int) -> dict[str, Any]:
    utterances, speakers = data
    drawn = drawn_batches(len(speakers), 16, epochs * len(speakers) // 16, this.args.seed)

    def loss(rows: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model([utterances[row] for row in rows]), speakers[rows])

    return this.train(what, drawn, loss, adamw(model, rate))


def of_speakers(data: Utterances, speakers: range) -> Utterances:
    kept = [row for row, speaker in enumerate(data[1].tolist()) if speaker in speakers]
    return [data[0][row] for row in kept], data[1][kept]


def adapt(this: Experiment, name: str, state: dict[str, Tensor], data: Utterances, test: Utterances) -> dict[str, Any]:
    """Starts from the LSTM of five speakers and a new head for nine."""
    args = this.args
    torch.manual_seed(args.seed)
    model = Recogniser(12, args.hidden, 9)
    model.load_state_dict(model.state_dict() | {key: v for key, v in state.items() if key.startswith("lstm.")})
    start = {key: value.clone() for key, value in model.head.state_dict().items()}
    before = accuracy(model, test)
    with torch.no_grad():
        logits = model(test[0])
    manager = None
    if name == "lora":
        manager = EfficientFineTuningManager(model)
        manager.apply_lora("lstm", rank=4, alpha=8, dropout_probability=0.0, modules_to_save=["head"])
    elif name == "head":
        freeze_body(model, "head")
    (trained, total), frozen = counts(model), Frozen(model)
    trace = fit(this, METHODS[name], model, data, args.learning_rate / (4 if name == "full" else 1), args.epochs)
    row = {
        "what": METHODS[name],
        "trainable": trained,
        "parameters": total,
        "frozen_values_bit_equal": frozen.check(),
        "accuracy_before": before,
        "accuracy": accuracy(model, test),
        "accuracy_known": accuracy(model, of_speakers(test, range(KNOWN))),
        "accuracy_new": accuracy(model, of_speakers(test, range(KNOWN, 9))),
        **trace,
    }
    if manager is not None:
        head = {key: value.clone() for key, value in model.head.state_dict().items()}
        with torch.no_grad(), manager.disable():
            model.head.load_state_dict(start)
            row["disabled_logits_bit_equal"] = torch.equal(model(test[0]), logits)
            model.head.load_state_dict(head)
        with torch.no_grad():
            on = model(test[0])
            manager.merge()
            row["merged_largest_difference"] = float((model(test[0]) - on).abs().max())
    return row


def speech(arguments: Sequence[str] | None = None) -> None:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--learning-rate", type=float, default=4e-3, help="a quarter of it where everything is trained")
    args = parser.parse_args(arguments)
    this = Experiment("speech", args)
    if args.quick:
        args.hidden, args.epochs = 16, 3
        train, test = made_up(90, 1), made_up(45, 2)
    else:
        folder = assets.fetch(assets.VOWELS, args.cache)
        train, test = (vowels(folder / f"JapaneseVowels_{part}.ts") for part in ("TRAIN", "TEST"))
    first = Recogniser(12, args.hidden, KNOWN)
    fit(this, f"speakers 1 to {KNOWN}", first, of_speakers(train, range(KNOWN)), 4e-3, args.epochs)
    known = accuracy(first, of_speakers(test, range(KNOWN)))
    rows = {name: adapt(this, name, first.state_dict(), train, test) for name in METHODS}
    this.table(
        f"Nine speakers; the LSTM knew {KNOWN}, of which it told {known:.1%} right",
        ["method", "trained", "accuracy", "of the five", "of the four new", "training, CPU"],
        [
            [
                row["what"],
                f"{row['trainable']:,} of {row['parameters']:,}",
                f"{row['accuracy_before']:.1%} -> {row['accuracy']:.1%}",
                f"{row['accuracy_known']:.1%}",
                f"{row['accuracy_new']:.1%}",
                f"{row['cpu_seconds']:.1f} s",
            ]
            for row in rows.values()
        ],
    )
    lora = rows["lora"]
    same = "equal bit for bit" if lora["disabled_logits_bit_equal"] else "NOT EQUAL"
    this.say(
        f"LoRA off and the first head back: logits {same} to those before; merged into the LSTM's weights, logits "
        f"differ by at most {lora['merged_largest_difference']:.1e}; {lora['frozen_values_bit_equal']:,} frozen values "
        "kept every bit."
    )

    def draw(figure: Any) -> None:
        axis = figure.subplots()
        groups = {"all": "accuracy", "five known": "accuracy_known", "four new": "accuracy_new"}
        for shift, ((_, row), colour) in enumerate(zip(rows.items(), (BEFORE, AFTER, OTHER), strict=True)):
            places = [place + 0.27 * (shift - 1) for place in range(len(groups))]
            bars = axis.bar(places, [100 * row[key] for key in groups.values()], 0.26, color=colour, label=row["what"])
            axis.bar_label(bars, fmt="%.1f", fontsize=8)
        axis.set(xticks=range(len(groups)), xticklabels=groups, ylabel="accuracy [%]", ylim=(0, 119))
        axis.legend(loc="upper right", ncols=3, fontsize=8)

    this.finish({"accuracy_first": known, "methods": rows}, draw, figsize=(7, 3.5))


if __name__ == "__main__":
    sys.exit(run(speech))
