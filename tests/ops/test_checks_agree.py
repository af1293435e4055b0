"""Each quick test of a call agrees with the check that words it, for calls with one or two arguments changed."""

import importlib

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastpeft
from fastpeft import ops
from fastpeft.ops import _checks

lora_linear, lora_adapter, linear4bit = (
    importlib.import_module(f"fastpeft.ops.{name}") for name in ("lora_linear", "lora_adapter", "linear4bit")
)
K, N, R = 6, 5, 2
DTYPES = [torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.complex64]
NO_TENSORS = [None, [1.0], "x", 3, np.ones((N, K), np.float32)]
DROPOUTS = [
    0,
    0.5,
    1.0,
    -0.1,
    float("nan"),
    True,
    False,
    "0.1",
    None,
    1j,
    torch.tensor(0.1),
    np.float64(0.1),
    np.float32(0.1),
]

quick = settings(max_examples=300, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))


def tensors(*shape):
    """A good tensor of this shape, or one that differs in one respect."""
    good = torch.ones(shape)
    shapes = [tuple(size + (i == j) for j, size in enumerate(shape)) for i in range(len(shape))]
    shapes += [shape[1:], (1, *shape), (*shape[:-1], 0)]
    others = (
        [good.to(dtype) for dtype in DTYPES]
        + [torch.ones(each) for each in shapes]
        + [good.to("meta"), good.t() if good.dim() == 2 else good]
    )
    return good, [*others, *NO_TENSORS]


def calls(**arguments):
    """Keyword arguments, of which at most two are other than good."""

    @st.composite
    def draw(pick):
        call = {name: good for name, (good, _) in arguments.items()}
        for name in pick(st.lists(st.sampled_from(sorted(arguments)), max_size=2, unique=True)):
            call[name] = pick(st.sampled_from(arguments[name][1]))
        return call

    return draw()


def weights():
    """A Weight4bit, doubly quantised or not, or one with a part changed."""
    good, other = (ops.quantize_4bit(torch.ones(N, K), block_size=32, double_quant=double) for double in (True, False))
    changed = [other, *NO_TENSORS]
    shapes = [(N, K, 1), (N + 1, K), (-N, -K), (2**62 + 4, 4), (float(N), K), (N * K,), (0, K), [N, K]]
    parts = {"shape": shapes, "quant_type": ["int4", 4], "block_size": [64, 48, 64.0, None], "dtype": [None]}
    for weight in (good, other):
        parts["packed"] = [
            weight.packed[:-1],
            weight.packed.view(-1, 1),
            weight.packed.int(),
            weight.packed.to("meta"),
            weight.packed.repeat(2)[::2],
            None,
        ]
        for i, scale in enumerate(weight.scales):
            swaps = [
                scale.double(),
                scale.to(torch.uint8).float(),
                scale.to("meta"),
                scale[None],
                scale.repeat(2),
                scale.repeat(2)[::2],
                None,
            ]
            parts.setdefault("scales", []).extend([*weight.scales[:i], swap, *weight.scales[i + 1 :]] for swap in swaps)
        parts["scales"] += [[], weight.scales[:1] * 2, weight.scales * 5]
        for name, values in parts.items():
            for value in values:
                changed.append(ops.Weight4bit(**{**vars(weight), name: value}))
    return good, changed


def raises(check, *args):
    """The house's error, or None; any other is a failure of this test."""
    try:
        check(*args)
    except (ValueError, TypeError) as error:
        assert str(error).split(": ")[0] in {
            "lora_linear",
            "lora_adapter",
            "linear4bit",
            "linear4bit_lora",
            "Weight4bit",
        }, error
        assert " must " in str(error) and ", got " in str(error), error
        return error
    return None


def agree(fits, check, run, call):
    error = raises(check)
    assert fits() == (error is None), error
    if error is not None:
        with pytest.raises(type(error), match=r"^(lora_linear|lora_adapter|linear4bit(_lora)?): "):
            run(**call)


FACTORS = {"lora_A": tensors(R, K), "lora_B": tensors(N, R), "lora_bias": tensors(N), "dropout": (0.1, DROPOUTS)}
BIASES = {"bias": tensors(N)}


@quick
@given(calls(x=tensors(4, K), weight=tensors(N, K), **FACTORS, **BIASES))
def test_lora_linear(call):
    names = ("x", "weight", "lora_A", "lora_B", "bias", "lora_bias", "dropout")
    asked = tuple(call[name] for name in names)
    agree(lambda: lora_linear._fits(*asked), lambda: lora_linear._check(*asked), ops.lora_linear, call)


@quick
@given(calls(x=tensors(4, K), **FACTORS))
def test_lora_adapter(call):
    asked = tuple(call[name] for name in ("x", "lora_A", "lora_B", "lora_bias", "dropout"))
    agree(lambda: lora_adapter._fits(asked), lambda: lora_adapter._check(asked), ops.lora_adapter, call)


@quick
@given(calls(x=tensors(4, K), weight=weights(), **FACTORS, **BIASES))
def test_linear4bit_lora(call):
    adapter = tuple(call[name] for name in FACTORS)
    asked = call["x"], call["weight"], call["bias"], adapter
    check = lambda: linear4bit._check("linear4bit_lora", *asked)  # noqa: E731
    agree(lambda: linear4bit._fits(*asked), check, ops.linear4bit_lora, call)


@quick
@given(calls(x=tensors(4, K), weight=weights(), **BIASES))
def test_linear4bit(call):
    asked = call["x"], call["weight"], call["bias"]
    agree(lambda: linear4bit._fits(*asked), lambda: linear4bit._check("linear4bit", *asked), ops.linear4bit, call)


def test_weight4bit():
    """Every changed weight, so that no part is left out by chance."""

    def sound(weight):
        try:
            return weight.sound()
        except _checks.UNFIT:
            return False

    good, changed = weights()
    checked = [weight for weight in [good, *changed] if isinstance(weight, ops.Weight4bit)]
    for weight in checked:
        assert sound(weight) == (raises(weight.check) is None), vars(weight)
    assert sum(map(sound, checked)) >= 6 and sum(not sound(weight) for weight in checked) > 60


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64])
@pytest.mark.parametrize("op", ["lora_linear", "lora_adapter"])
def test_no_integers_and_no_complex_numbers(op, dtype):
    x, factors = torch.ones(4, K, dtype=dtype), (torch.ones(R, K), torch.ones(N, R))
    given = (x, torch.ones(N, K, dtype=dtype), *factors) if op == "lora_linear" else (x, *factors)
    with pytest.raises(TypeError, match=f"^{op}: x must be float32, bfloat16, float16 or float64, got {dtype}"):
        getattr(ops, op)(*given)


@pytest.mark.parametrize("make", [fastpeft.LoRALayer, fastpeft.LoRALinear, fastpeft.QLoRALinear])
def test_a_module_blames_its_input(make):
    """Its own parameters fit one another: what differs from them is x."""
    module = make(64, 32, rank=2) if make is not fastpeft.QLoRALinear else make(torch.nn.Linear(64, 32), rank=2)
    for x, text in (
        (torch.ones(4, 63), r"x must have shape \[..., in_features\] = \[..., 64\], got \[4, 63\]"),
        (torch.ones(4, 64, device="meta"), "x must be on the device of (weight|lora_A), cpu, got meta"),
        (torch.ones(4, 64, dtype=torch.int64), "x must be float32, bfloat16, float16 or float64, got torch.int64"),
    ):
        with pytest.raises((ValueError, TypeError), match=f"^[a-z0-9_]+: {text}$"):
            module(x)
