"""An MLP on MNIST, its worst digit, and a LoRA of rank 1 for that digit alone, as a parametrization of the weights.

    python examples/experiments/digits.py

Trains 784-1000-2000-10 on 4,000 images of MNIST, looks which digit of the other 1,000 it gets wrong most often, puts
W + B A of rank 1 on its three weights and trains A and B on images of that digit. Shows that no frozen weight moved,
that with LoRA disabled every logit is what it was, and how many parameters were added. Trained on one class alone, the
model takes other digits for it more often. So a second LoRA is trained beside it, from the same start, with as many
images of all digits mixed in: it helps that digit and costs the others little.
"""

import argparse
import copy
import gzip
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import fastpeft
from _experiment import AFTER, BEFORE, OTHER, Experiment, Frozen, adamw, counts, drawn_batches, options, run
from fastpeft.cli import assets

WEIGHTS = ("fc1", "fc2", "fc3")


class Classifier(nn.Module):
    """The MLP of the experiment: two hidden layers."""

    def __init__(self, inputs: int, first: int, second: int) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(inputs, first), nn.Linear(first, second), nn.Linear(second, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc3(torch.relu(self.fc2(torch.relu(self.fc1(images)))))


def mnist(cache: Path | None) -> tuple[Tensor, Tensor]:
    """Images [5000, 784] in 0 to 1 and digits [5000]."""
    file = assets.fetch(assets.MNIST, cache) / "mnist_5k.csv.gz"
    rows = torch.from_numpy(np.loadtxt(io.BytesIO(gzip.decompress(file.read_bytes())), delimiter=",", dtype=np.uint8))
    return rows[:, :-1].float() / 255, rows[:, -1].long()


def small_digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's 1,797 images of 8 x 8."""
    from sklearn.datasets import load_digits

    images, digits = load_digits(return_X_y=True)
    return torch.from_numpy(images).float() / 16, torch.from_numpy(digits).long()


def errors(logits: Tensor, digits: Tensor) -> list[int]:
    """Wrong answers by digit."""
    wrong = logits.argmax(-1) != digits
    return [int(wrong[digits == digit].sum()) for digit in range(10)]


def logits_of(net: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return net(images)


def parametrize_all(net: nn.Module, args: argparse.Namespace) -> None:
    """LoRA on the three weights, and nothing else trained."""
    for name in WEIGHTS:
        fastpeft.add_parametrization(getattr(net, name), rank=args.rank, alpha=args.alpha)
    for name, parameter in net.named_parameters():
        parameter.requires_grad_("lora" in name)


def digits(arguments: Sequence[str] | None = None) -> None:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--rank", type=int, default=1)
    parser.add_argument("--alpha", type=float, default=1.0)
    parser.add_argument("--steps", type=int, default=100, help="of LoRA, of 10 images each")
    args: argparse.Namespace = parser.parse_args(arguments)
    this = Experiment("digits", args)
    images, labels = small_digits() if args.quick else mnist(args.cache)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(args.seed))
    held_out = len(images) // 5
    test, train = order[:held_out], order[held_out:]
    images_test, labels_test = images[test], labels[test]
    net = Classifier(images.shape[1], *((64, 128) if args.quick else (1000, 2000)))

    def loss(rows: Tensor) -> Tensor:
        return nn.functional.cross_entropy(net(images[rows]), labels[rows])

    rows = drawn_batches(len(train), 10, len(train) // 10, args.seed)
    this.train("train the MLP", [train[each] for each in rows], loss, torch.optim.Adam(net.parameters()), decay=False)
    plain = counts(net)[1]
    before = logits_of(net, images_test)
    worst = max(range(10), key=errors(before, labels_test).__getitem__)

    twin = copy.deepcopy(net)
    parametrize_all(net, args)
    trained, total = counts(net)
    frozen, identity = Frozen(net), torch.equal(logits_of(net, images_test), before)
    of_it = train[labels[train] == worst]
    rows = [of_it[each] for each in drawn_batches(len(of_it), 10, args.steps, args.seed)]
    this.train(f"LoRA, digit {worst}", rows, loss, adamw(net, 1e-3), decay=False)
    kept = frozen.check()
    on = logits_of(net, images_test)
    with fastpeft.lora_disabled(net):
        off = logits_of(net, images_test)
    for name in WEIGHTS:
        parametrize.remove_parametrizations(getattr(net, name), "weight")
    merged = logits_of(net, images_test)

    net = twin
    parametrize_all(net, args)
    others = [train[each] for each in drawn_batches(len(train), 10, args.steps, args.seed)]
    mixture = [torch.cat(pair) for pair in zip(rows, others, strict=True)]
    this.train(f"LoRA, {worst} and all", mixture, loss, adamw(net, 1e-3), decay=False)
    mixed = logits_of(net, images_test)

    said = {"before": before, "on": on, "off": off, "mixed": mixed}
    counted = {name: errors(logits, labels_test) for name, logits in said.items()}
    result: dict[str, Any] = {
        "worst_digit": worst,
        "images_of_it": int((labels_test == worst).sum()),
        "errors": counted,
        "total": {name: sum(by_digit) for name, by_digit in counted.items()},
        "accuracy_before": 1 - sum(counted["before"]) / held_out,
        "identity_at_init": identity,
        "frozen_values_bit_equal": kept,
        "disabled_logits_bit_equal": torch.equal(off, before),
        "merged_largest_difference": float((merged - on).abs().max()),
        "merged_errors_equal": errors(merged, labels_test) == counted["on"],
        "trainable": trained,
        "parameters": total,
        "added_share": (total - plain) / plain,
    }
    this.table(
        f"Errors by digit, {held_out} images of the test",
        ["digit", "before", f"LoRA for {worst} on", "LoRA disabled", f"LoRA, {worst} and all"],
        [*([d, *(counted[name][d] for name in counted)] for d in range(10)), ["all", *result["total"].values()]],
    )
    this.say(
        f"{trained:,} parameters are trained beside {plain:,} ({result['added_share']:.3%}); {kept:,} frozen values "
        "are the same to the bit."
    )
    same = "equal bit for bit" if result["disabled_logits_bit_equal"] else "NOT EQUAL"
    this.say(f"LoRA disabled: logits and errors {same} to those before.")
    this.say(
        f"LoRA merged into the weights: logits differ by at most {result['merged_largest_difference']:.1e}, errors are "
        + ("the same." if result["merged_errors_equal"] else "OTHERS.")
    )

    def draw(figure: Any) -> None:
        axis = figure.subplots()
        names = {
            "before": "LoRA off",
            "on": f"LoRA for {worst} alone",
            "mixed": f"LoRA for {worst}, all digits mixed in",
        }
        for shift, (name, colour) in enumerate(zip(names, (BEFORE, AFTER, OTHER), strict=True)):
            places = [digit + 0.28 * (shift - 1) for digit in range(10)]
            axis.bar_label(axis.bar(places, counted[name], 0.28, color=colour, label=names[name]), fontsize=7)
        axis.axvspan(worst - 0.5, worst + 0.5, color=BEFORE, alpha=0.2)
        axis.set(xlabel="digit", ylabel=f"errors of {held_out} images", xticks=range(10))
        axis.set_title(f"LoRA of rank {args.rank} for digit {worst}: {trained:,} parameters beside {plain:,}")
        axis.legend()

    this.finish(result, draw, figsize=(7, 3.5))


if __name__ == "__main__":
    sys.exit(run(digits))
