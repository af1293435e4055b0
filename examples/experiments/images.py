"""EfficientNet-Lite0 with LoRA in its convolutions and a new head, on Fashion-MNIST.

    python examples/experiments/images.py
    python examples/experiments/images.py --methods head lora depthwise

ImageNet's weights, frozen, on pictures of clothes of 64 x 64: trained are a new head alone (head), LoRA of rank 8 on
all convolutions of 1 x 1 and the head (lora), or LoRA on every convolution, those that go channel by channel included
(depthwise). The first 6,000 images to train on, twice, the first 1,000 to test on. Batch normalisation keeps its
averages. Where there is no apt-get, --data names a folder with Fashion-MNIST's four idx.gz files.
"""

import gzip
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from _efficientnet import MEAN, STAGES, STD, EfficientNetLite, pretrained
from _experiment import AFTER, BEFORE, OTHER, Experiment, Frozen, adamw, counts, drawn_batches, options, run
from fastpeft import EfficientFineTuningManager, freeze_body
from fastpeft.cli import assets

State = tuple[dict[str, Tensor], Tensor]
POINTWISE = [r".*(expand|project)_conv", "conv_head"]
METHODS = {
    "head": ("head only", []),
    "lora": ("LoRA r 8 in convolutions of 1 x 1", POINTWISE),
    "depthwise": ("LoRA r 8 in every convolution", [r".*conv(\.1)?|conv_(stem|head)(\.1)?"]),
}


def fashion(folder: Path, part: str, count: int) -> tuple[Tensor, Tensor]:
    """The first `count` images [count, 28, 28] in 0 to 1 of a part, "train" or "t10k", and their classes."""
    pixels = np.frombuffer(gzip.decompress((folder / f"{part}-images-idx3-ubyte.gz").read_bytes()), np.uint8, offset=16)
    labels = np.frombuffer(gzip.decompress((folder / f"{part}-labels-idx1-ubyte.gz").read_bytes()), np.uint8, offset=8)
    images = torch.tensor(pixels[: count * 28 * 28]).view(count, 28, 28)
    return images.float() / 255, torch.tensor(labels[:count]).long()


def small_digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's digits as images [1797, 8, 8] in 0 to 1."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.from_numpy(data.images).float() / 16, torch.from_numpy(data.target).long()


def prepared(images: Tensor, side: int) -> Tensor:
    """Enlarged, three equal channels, scaled as the model knows it."""
    large = nn.functional.interpolate(images.unsqueeze(1), (side, side), mode="bilinear", align_corners=False)
    return ((large - MEAN) / STD).expand(-1, 3, -1, -1)


@torch.no_grad()
def untrained(data: Tensor) -> EfficientNetLite:
    """A small network with random weights, whose averages are those of `data`."""
    model = EfficientNetLite(10, STAGES[:3], 64)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    model(data)
    return model


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor, side: int) -> float:
    parts = zip(images.split(100), labels.split(100), strict=True)
    return sum(int((model(prepared(x, side)).argmax(-1) == y).sum()) for x, y in parts) / len(labels)


def images(arguments: Sequence[str] | None = None) -> None:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="Fashion-MNIST's idx.gz files; None: the package's")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=["head", "lora"])
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=32)
    args = parser.parse_args(arguments)
    this = Experiment("images", args)
    if args.quick:
        drawn, digits = small_digits()
        data, test, side = (drawn[:192], digits[:192]), (drawn[192:292], digits[192:292]), 16
    else:
        folder = args.data or assets.fetch(assets.FASHION_MNIST, args.cache)
        data, test, side = fashion(folder, "train", 6000), fashion(folder, "t10k", 1000), 64
    rows = {}
    for name in args.methods:
        torch.manual_seed(args.seed)
        model = untrained(prepared(data[0], side)) if args.quick else pretrained(10, args.cache)
        rows[name] = tune(this, name, model.eval(), data, test, side)
    show(this, rows)


def tune(
    this: Experiment, name: str, model: nn.Module, data: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], side: int
) -> dict[str, Any]:
    """Adapts, trains in eval mode, so that batch normalisation keeps its averages, and tests."""
    what, targets = METHODS[name]
    probe, before = prepared(test[0][:50], side), accuracy(model, *test, side)
    with torch.no_grad():
        start = {name: value.clone() for name, value in model.fc.state_dict().items()}, model(probe)
    if targets:
        manager = EfficientFineTuningManager(model)
        manager.apply_lora(targets, rank=8, alpha=16, dropout_probability=0.0, modules_to_save=["fc"])
        adapted = len(manager.entries)
    else:
        freeze_body(model, "fc")
        manager, adapted = None, 0
    model.eval()
    (trained, total), frozen, (pictures, labels) = counts(model), Frozen(model, buffers=True), data
    args = this.args
    drawn = drawn_batches(len(labels), args.batch_size, args.epochs * len(labels) // args.batch_size, args.seed)

    def loss(rows: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model(prepared(pictures[rows], side)), labels[rows])

    trace = this.train(name, drawn, loss, adamw(model, args.learning_rate))
    row = {
        "what": what,
        "convolutions_adapted": adapted,
        "trainable": trained,
        "parameters": total,
        "frozen_values_bit_equal": frozen.check(),
        "accuracy_before": before,
        "accuracy": accuracy(model, *test, side),
        **trace,
    }
    if manager is not None:
        row |= off_and_merged(manager, model, probe, start)
    return row


@torch.no_grad()
def off_and_merged(manager: EfficientFineTuningManager, model: Any, probe: Tensor, start: State) -> dict[str, Any]:
    """With LoRA off and the head that it began with, the network is what it was; merged it says what it says with LoRA.

    start    the head's state and the logits of `probe` before training
    """
    head, logits = start
    on, trained = model(probe), {name: value.clone() for name, value in model.fc.state_dict().items()}
    with manager.disable():
        model.fc.load_state_dict(head)
        off = model(probe)
        model.fc.load_state_dict(trained)
    manager.merge()
    return {
        "disabled_logits_bit_equal": torch.equal(off, logits),
        "merged_largest_relative_difference": float((model(probe) - on).abs().max() / on.abs().max()),
    }


def show(this: Experiment, rows: dict[str, dict[str, Any]]) -> None:
    this.table(
        "Fashion-MNIST with ImageNet's EfficientNet-Lite0",
        ["method", "trained", "accuracy", "training, CPU"],
        [
            [
                f"{name}: {row['what']}",
                f"{row['trainable']:,} of {row['parameters']:,}",
                f"{row['accuracy_before']:.1%} -> {row['accuracy']:.1%}",
                f"{row['cpu_seconds']:.0f} s",
            ]
            for name, row in rows.items()
        ],
    )

    for name, row in rows.items():
        if "disabled_logits_bit_equal" in row:
            same = "equal bit for bit" if row["disabled_logits_bit_equal"] else "NOT EQUAL"
            this.say(
                f"{name}: {row['convolutions_adapted']} convolutions adapted; LoRA off and the first head back: logits "
                f"{same} to those before; merged, they differ by {row['merged_largest_relative_difference']:.1e} of "
                f"the largest; {row['frozen_values_bit_equal']:,} frozen values, averages included, kept every bit."
            )

    def draw(figure: Any) -> None:
        curves, bars = figure.subplots(1, 2, width_ratios=(2, 1))
        for (name, row), colour in zip(rows.items(), (BEFORE, AFTER, OTHER), strict=False):
            window = max(1, len(row["losses"]) // 15)
            means = [sum(row["losses"][i : i + window]) / window for i in range(len(row["losses"]) - window + 1)]
            curves.plot(means, color=colour, label=row["what"])
            bars.bar_label(bars.bar(name, 100 * row["accuracy"], color=colour), fmt="%.1f")
        curves.set(xlabel="step", ylabel="training loss [nats]")
        curves.legend()
        bars.set(ylabel="accuracy [%]", ylim=(0, 105))

    this.finish({"methods": rows}, draw, figsize=(8, 3.5))


if __name__ == "__main__":
    sys.exit(run(images))
