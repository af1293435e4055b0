"""fastpeft.info() and fastpeft.explain()."""

import pytest
import torch

import fastpeft
from cases import normal
from fastpeft.testing import backends
from nn_cases import linear


def test_info():
    found = fastpeft.info()
    assert set(found.backends) == {"cpp", "cuda", "triton", "eager"}
    assert found.backends["eager"] == "serves cpu"
    assert ("isa" in found.extension) == ("cpp" in backends("lora_linear_fwd"))
    assert str(found).startswith(f"fastpeft {fastpeft.__version__}\n")


def test_explain_counts_equal_calls_and_leaves_the_generator_alone():
    layers = [fastpeft.LoRALinear.from_linear(torch.nn.Linear(12, 12), rank=3, alpha=6, dropout=0.25) for _ in range(2)]
    model = torch.nn.Sequential(*layers)
    x, state = normal(2, 5, 12), torch.get_rng_state()
    explanation = fastpeft.explain(model, x)
    assert torch.equal(torch.get_rng_state(), state)
    (call,) = explanation.calls
    assert (call.count, call.shape, call.p) == (2, (("M", 10), ("K", 12), ("N", 12), ("rank", 3)), 0.25)
    assert call.flop == 2 * 10 * 12 * 12 + 2 * 10 * 3 * 24
    assert "lora_linear x 2: M=10, K=12, N=12, rank=3, float32, dropout 0.25" in str(explanation)


@pytest.mark.parametrize("backend", ["eager", *backends("lora_shrink")])
def test_explain_an_adapter_alone(backend):
    layer = fastpeft.LoRALayer(12, 7, rank=3, dropout=0.0, backend=backend)
    (call,) = fastpeft.explain(layer, normal(2, 5, 12)).calls
    assert (call.op, call.backend, call.shape) == (
        "lora_adapter",
        backend,
        (("M", 10), ("K", 12), ("N", 7), ("rank", 3)),
    )
    assert (call.flop, call.elements) == (2 * 10 * 3 * 19, 10 * 12 + 10 * 7)


def test_explain_low_precision_on_a_cpu():
    layer = fastpeft.LoRALinear.from_linear(torch.nn.Linear(12, 12).bfloat16(), rank=3, alpha=6, dropout=0.0)
    (call,) = fastpeft.explain(layer, normal(4, 12, dtype=torch.bfloat16)).calls
    assert call.strategy.split(":")[0] in {"accumulate", "upcast", "eager"}


def test_explain_a_module_of_no_operator():
    assert str(fastpeft.explain(torch.nn.Linear(3, 3), normal(1, 3))) == "no fastpeft operator was called"


@pytest.mark.skipif("cpp" not in backends("linear4bit_fwd"), reason="the extension is not built")
def test_explain_4_bits_on_a_cpu():
    from fastpeft import _native

    layer = fastpeft.QLoRALinear(linear(64, 64), rank=3, backend="cpp").eval()

    def path(M, dtype):
        (call,) = fastpeft.explain(layer, normal(M, 64, dtype=dtype)).calls
        return call.strategy.split(":")[0]

    try:
        _native.set_isa("base")
        assert [path(M, torch.bfloat16) for M in (1, 4, 5)] == ["gemv", "gemv", "panels"]
        better = {"avx512_bf16": ["gemv", "fused", "fused"], "amx_bf16": ["gemv", "fused", "panels"]}
        for isa, paths in better.items():
            try:
                _native.set_isa(isa)
            except ValueError:
                continue
            assert [path(M, torch.bfloat16) for M in (1, 512, 513)] == paths
            assert [path(M, torch.float32) for M in (1, 500)] == ["gemv", "panels"]
    finally:
        _native.set_isa("auto")


@pytest.mark.parametrize("backend", ["eager", *backends("linear4bit_fwd")])
def test_explain_4_bits(backend):
    model = torch.nn.Sequential(*(fastpeft.QLoRALinear(linear(64, 64), rank=3, backend=backend) for _ in range(2)))
    (call,) = fastpeft.explain(model, normal(5, 64)).calls
    assert (call.op, call.backend, call.count) == ("linear4bit_lora", backend, 2)
    assert call.shape == (("M", 5), ("K", 64), ("N", 64), ("rank", 3)) and call.p == 0.1
    assert call.strategy.endswith("nf4 in blocks of 64, absmax in 8 bits")
    model[0].disable()
    assert [call.op for call in fastpeft.explain(model, normal(5, 64)).calls] == ["linear4bit", "linear4bit_lora"]


X, A, B, W = torch.ones(4, 64), torch.ones(2, 64), torch.ones(32, 2), torch.ones(32, 64)
S, DY, Q = torch.ones(4, 2), torch.ones(4, 32), fastpeft.ops.quantize_4bit(torch.ones(32, 64))
IMAGE, A_IMAGE, S_IMAGE = normal(1, 3, 4, 4), normal(2, 3, 2, 2), normal(9, 2)
EXAMPLES = {
    "conv_grad_a": lambda ops: ops.conv_grad_a(IMAGE, S_IMAGE, A_IMAGE),
    "conv_shrink": lambda ops: ops.conv_shrink(IMAGE, A_IMAGE),
    "lora_conv1d": lambda ops: ops.lora_conv1d(IMAGE[:, :, 0], A_IMAGE[:, :, 0], A_IMAGE[:, :, 0], torch.ones(2, 2)),
    "lora_conv2d": lambda ops: ops.lora_conv2d(IMAGE, A_IMAGE, A_IMAGE, torch.ones(2, 2)),
    "lora_conv3d": lambda ops: ops.lora_conv3d(IMAGE[None], A_IMAGE[:, None, None, 0], A_IMAGE[:, None, None, 0], torch.ones(2, 2)),
    "dequantize_4bit": lambda ops: ops.dequantize_4bit(Q),
    "linear4bit": lambda ops: ops.linear4bit(X, Q),
    "linear4bit_lora": lambda ops: ops.linear4bit_lora(X, Q, A, B),
    "lora_adapter": lambda ops: ops.lora_adapter(X, A, B),
    "lora_between": lambda ops: ops.lora_between(X, A, B, torch.tanh, weight=W),
    "lora_expand": lambda ops: ops.lora_expand(S, B),
    "lora_expand_add": lambda ops: ops.lora_expand_add(DY.clone(), S, B),
    "lora_grad_a": lambda ops: ops.lora_grad_a(X, S, A),
    "lora_grad_b": lambda ops: ops.lora_grad_b(DY, S, B),
    "lora_linear": lambda ops: ops.lora_linear(X, W, A, B),
    "lora_linear_grouped": lambda ops: ops.lora_linear_grouped(X, W, A[None], B[None], torch.tensor([0])),
    "lora_linear_fused_dx": lambda ops: ops.lora_linear_fused_dx(DY, W, S, A),
    "lora_linear_fused_fwd": lambda ops: ops.lora_linear_fused_fwd(X, W, S, B),
    "lora_shrink": lambda ops: ops.lora_shrink(X, A),
    "quantize_4bit": lambda ops: ops.quantize_4bit(W),
}  # fmt: skip

# Made of other operators with torch's own operations between them: told by these.
MADE_OF = {"lora_between": {"lora_shrink", "lora_between"}, "lora_linear_grouped": {"lora_adapter"}}


@pytest.mark.parametrize(
    "op", sorted(name for name in fastpeft.ops.__all__ if name not in {"Weight4bit", "pack_mask", "unpack_mask"})
)
def test_every_operator_is_explained(op):
    """By its own name, or by those of what it is made of, and once."""
    assert op in EXAMPLES, "a new operator has an example of a call here"

    class Module(torch.nn.Module):
        def forward(self):
            return EXAMPLES[op](fastpeft.ops)

    calls = fastpeft.explain(Module()).calls
    assert {call.op for call in calls} == MADE_OF.get(op, {op})
    for call in calls:
        assert call.count == 1 and call.strategy and call.elements > 0
        assert str(call).startswith(f"{call.op}: ")
