"""Conditional and Hyper: every form of a task, segments and masks alike, shapes, merges, refusals."""

import importlib

import pytest
import torch
from torch import nn

from fastpeft import ConditionalLoRALayer, ConditionalLoRALinear, HyperLoRALayer, HyperLoRALinear, ops, task
from nn_cases import linear
from variant_cases import assert_parity, assert_whole, masked_in_training

grouped = importlib.import_module("fastpeft.ops.lora_linear_grouped")


def conditional(layout="in_out", dtype=torch.float32, **options):
    options = {"num_tasks": 3, "rank": 4, "dropout": 0.0, "alpha": 8.0, "layout": layout, **options}
    module = ConditionalLoRALinear(linear(dtype=dtype), **options)
    nn.init.normal_(module.lora_B, std=0.4)
    return module


def hyper(layout="in_out", dtype=torch.float32, **options):
    options = {"rank": 3, "dropout": 0.0, "alpha": 6.0, "layout": layout, "task_embedding_dim": 5, **options}
    module = HyperLoRALinear(linear(dtype=dtype), **options)
    for layer in (module.hyper_net[0], module.hyper_net[2]):
        nn.init.normal_(layer.weight, std=0.2)
    return module


def by_row(module, ids):
    """The definition, with a gathered A and B for each row."""

    def run(p, x):
        a, b = (p["lora_A"].mT, p["lora_B"].mT) if module.layout == "in_out" else (p["lora_A"], p["lora_B"])
        rows = ids.reshape(*ids.shape, *[1] * (x.dim() - 1 - ids.dim())).expand(x.shape[:-1])
        acts = (rows >= 0).to(x.dtype).unsqueeze(-1)
        own_a, own_b = a[rows.clamp(min=0)], b[rows.clamp(min=0)]
        update = torch.einsum("...nr,...rk,...k->...n", own_b, own_a, x)
        if "lora_bias" in p:
            update = update + p["lora_bias"][rows.clamp(min=0)]
        return x @ p["weight"].t() + p["bias"] + update * module.scaling * acts

    return run


IDS = {
    "rows": ((7,), torch.tensor([0, 2, 0, 1, -1, 2, 2])),
    "sorted": ((7,), torch.tensor([0, 0, 1, 1, 1, 2, -1])),
    "samples": ((3, 4), torch.tensor([2, 0, 2])),
    "tokens": ((2, 3), torch.tensor([[0, 1, -1], [2, 2, 0]])),
}


@pytest.mark.parametrize("road", ["segments", "masked"])
@pytest.mark.parametrize("kind", IDS)
@pytest.mark.parametrize(("layout", "dtype"), [("in_out", torch.float32), ("out_in", torch.bfloat16)], ids=str)
def test_parity(kind, layout, dtype, road, monkeypatch):
    leading, ids = IDS[kind]
    module = conditional(layout, dtype, bias=kind != "rows")
    if module.lora_bias is not None:
        nn.init.normal_(module.lora_bias)
    if road == "masked":  # what a GPU takes
        monkeypatch.setattr(
            grouped,
            "_segments",
            lambda x, a, b, rows, bias, *rest: grouped._masked(x, None, a, b, rows, None, bias, *rest),
        )
    assert_parity(module, by_row(module, ids), torch.randn(*leading, 32, dtype=torch.float64), dtype, ids)


@pytest.mark.parametrize("ids", [1, torch.tensor(1), torch.tensor([1]), torch.tensor([1] * 6)])
def test_forms_of_a_task(ids):
    module = conditional()
    x = torch.randn(6, 32)
    a, b = module.factors()
    expected = ops.lora_linear(x, module.weight, a[1], b[1], module.bias, scale=module.scaling)
    torch.testing.assert_close(module(x, ids), expected)
    with task(ids):
        torch.testing.assert_close(nn.Sequential(module)(x), expected)
    layer = ConditionalLoRALayer(768, 768, num_tasks=3)
    assert layer(torch.randn(32, 768), torch.tensor([1])).shape == (32, 768)
    assert layer(torch.randn(32, 768), torch.zeros(32, dtype=torch.int32)).shape == (32, 768)


def test_base_alone_empty_and_whole():
    module = conditional()
    x = torch.randn(5, 32)
    torch.testing.assert_close(module(x, -1), nn.functional.linear(x, module.weight, module.bias))
    assert module(x[:0], torch.zeros(0, dtype=torch.int64)).shape == (0, 24)
    base = linear()
    fresh = ConditionalLoRALinear(base, num_tasks=2)
    torch.testing.assert_close(fresh(x, 1), base(x))
    assert fresh.lora_A.shape == (2, 8, 32) and ConditionalLoRALinear(32, 24, 2, 4).lora_A.shape == (2, 32, 4)
    assert_whole(module, x, torch.tensor([0, 1, 2, 1, 0]))
    masked_in_training(module, x, torch.tensor([0, 1, 2, 1, 0]))


def test_masked_rows_out_of_range_are_nan():
    module = conditional()
    a, b = module.factors()
    rows = torch.tensor([0, 3, -2, -1])
    y = grouped._masked(torch.randn(4, 32), module.weight, a, b, rows, None, None, 1.0, 0.0, None)
    assert y.isnan().all(1).tolist() == [False, True, True, False]


def test_merge_of_one_task():
    module = conditional()
    x = torch.randn(3, 32)
    y = module(x, 2)
    with pytest.raises(ValueError, match="task_id must be given"):
        module.merge()
    module.merge(2)
    torch.testing.assert_close(module(x, 0), y)
    module.unmerge()
    torch.testing.assert_close(module.delta_weight(2), module.delta_weight(torch.tensor([2])))
    with pytest.raises(ValueError, match="task_id must be given"):
        module.to_linear()


@pytest.mark.parametrize("samples", [0, 4])
@pytest.mark.parametrize(("layout", "dtype"), [("in_out", torch.float32), ("out_in", torch.bfloat16)], ids=str)
def test_hyper_parity(layout, dtype, samples):
    module = hyper(layout, dtype)
    embedding = torch.randn(samples, 5) if samples else torch.randn(5)

    def run(p, x):
        e = embedding.to(x.dtype)
        hidden = torch.relu(e @ p["hyper_net.0.weight"].t() + p["hyper_net.0.bias"])
        made = hidden @ p["hyper_net.2.weight"].t() + p["hyper_net.2.bias"]
        a, b = made.split((3 * 32, 3 * 24), dim=-1)
        a, b = (a.unflatten(-1, (32, 3)), b.unflatten(-1, (3, 24))) if layout == "in_out" else (
            a.unflatten(-1, (3, 32)).mT, b.unflatten(-1, (24, 3)).mT)  # fmt: skip
        return x @ p["weight"].t() + p["bias"] + x @ a @ b * module.scaling

    assert_parity(module, run, torch.randn(4, 6, 32, dtype=torch.float64), dtype, embedding)


def test_hyper_forms_and_whole():
    layer = HyperLoRALayer(768, 512)
    x, e = torch.randn(4, 768), torch.randn(1, 16)
    assert layer(x, e).shape == (4, 512) and not layer(x, e).any()  # the identity at init, as B is zero
    module = hyper()
    x, e = torch.randn(4, 32), torch.randn(5)
    torch.testing.assert_close(module(x, e), module(x, e.view(1, 5)))
    torch.testing.assert_close(module(x, e), module(x, e.expand(4, 5)))
    assert_whole(module, x, e)
    masked_in_training(module, x, e)
    y = module(x, e)
    with task(e):
        torch.testing.assert_close(module(x), y)
    module.merge(e)
    torch.testing.assert_close(module(x, e), y)
    assert {"hyper_net.0.weight", "hyper_net.2.bias"} <= module.state_dict().keys()
    assert "lora_A" not in module.state_dict()


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: conditional()(torch.randn(2, 32)), ValueError, "task_id must be given"),
        (lambda: conditional()(torch.randn(2, 32), 3), ValueError, r"task_id must be in \[-1, 3\), got 3"),
        (lambda: conditional()(torch.randn(2, 32), torch.tensor([0, 3])), ValueError, r"task_id must be in \[-1, 3\), got 3"),
        (lambda: conditional()(torch.randn(2, 32), torch.tensor([0, -2])), ValueError, r"task_id must be in \[-1, 3\), got -2"),
        (lambda: conditional()(torch.randn(2, 32), torch.tensor([0.0, 1.0])), TypeError, "task_id must be an int or a tensor of integers"),
        (lambda: conditional()(torch.randn(2, 32), True), TypeError, "task_id must be an int"),
        (lambda: conditional()(torch.randn(2, 32), torch.zeros(3, dtype=torch.int64)), ValueError, r"task_id must have x's first dimensions, \[2\]"),
        (lambda: conditional()(torch.randn(2, 32), 0, 1), TypeError, "arguments must be x and task_id"),
        (lambda: conditional(num_tasks=0), ValueError, "num_tasks must be at least 1"),
        (lambda: ConditionalLoRALayer(8, 8), TypeError, "num_tasks must be an integer"),
        (lambda: hyper()(torch.randn(2, 32)), ValueError, "task_embedding must be given"),
        (lambda: hyper()(torch.randn(2, 32), torch.randn(4)), ValueError, r"task_embedding must have shape \[5\], \[1, 5\] or \[N, 5\]"),
        (lambda: hyper()(torch.randn(2, 32), torch.randn(3, 5)), ValueError, "task_embedding must have a row for each"),
        (lambda: hyper()(torch.randn(2, 32), torch.ones(5, dtype=torch.int64)), TypeError, "task_embedding must be float32"),
        (lambda: hyper().merge(), ValueError, "task_embedding must be given"),
        (lambda: hyper(init="randn"), ValueError, "init must be None: hyper_net makes A and B"),
    ],
)  # fmt: skip
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
