"""What fp16 and narrow biases must not lose, and sums that fp32 does not hold."""

import pytest
import torch

from cases import normal
from fastpeft import ops
from fastpeft.testing import backends
from instruction_sets import isas, running


def gradients(run, *inputs):
    leaves = [t.clone().requires_grad_() for t in inputs]
    run(*leaves).double().sum().backward()
    return [leaf.grad.double() for leaf in leaves]


@pytest.mark.parametrize(
    "backend", [name for name in ("cpp", "eager") if name in ("eager", *backends("lora_linear_fwd"))]
)
@pytest.mark.parametrize("four_bit", [False, True])
@pytest.mark.parametrize("M", [1, 40])
@pytest.mark.parametrize("over", ["s", "ds"])
def test_fp16_where_s_or_ds_overflows(backend, four_bit, M, over):
    """With fp32 adapters every gradient is what fp32 gives."""
    w, x = (normal(32, 64) * 1e-3).half(), normal(M, 64).half()
    a, b, scale, dy = normal(4, 64), normal(32, 4), 1e-4, 1.0
    if over == "s":
        x, a = x * 2e3, a * 60
    else:
        a, b, scale, dy = a * 1e-3, b * 10, 1.0, 3e4
    q = ops.quantize_4bit(w)
    op, base = (ops.linear4bit_lora, q) if four_bit else (ops.lora_linear, w)
    found = gradients(lambda x, a, b: op(x, base, a, b, scale=scale, backend=backend) * dy, x, a, b)

    base = ops.dequantize_4bit(q).double() if four_bit else w.double()
    x, a, b = x.double(), a.double(), b.double()
    gold = gradients(lambda x, a, b: (x @ base.T + scale * (x @ a.T) @ b.T) * dy, x, a, b)
    assert (x @ a.T if over == "s" else scale * dy * b.sum(0)).abs().max() > 65504
    for ours, exact in zip(found, gold, strict=True):
        assert (ours - exact).abs().max() <= 4e-3 * exact.abs().max()


@pytest.mark.parametrize("backend", ["eager", *backends("lora_linear_fwd")])
@pytest.mark.parametrize("scale", [1.1, torch.tensor(1.1)], ids=["float", "tensor"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_lora_bias(backend, scale, dtype):
    """Multiplied by scale in fp32, and not rounded to its own dtype again."""
    x, w, a, b = torch.zeros(2, 4), normal(3, 4), normal(1, 4), torch.zeros(3, 1)
    lora_bias = normal(3, dtype=dtype)
    exact = (lora_bias.float() * 1.1).expand(2, 3)
    for y in (
        ops.lora_linear(x, w, a, b, None, lora_bias, scale=scale, backend=backend),
        ops.lora_adapter(x, a, b, lora_bias, scale=scale, backend=backend),
        ops.linear4bit_lora(x, ops.quantize_4bit(w), a, b, None, lora_bias, scale=scale, backend=backend),
    ):
        torch.testing.assert_close(y, exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", ["eager", *backends("quantize_4bit")])
def test_absmax_whose_sum_is_not_finite(backend):
    """Each is finite, and so is the weight of single quantisation; doubly, its mean would have made every value NaN."""
    w = torch.full((512,), 1e38)
    with pytest.raises(ValueError, match="w must have blocks whose absmax have a finite sum in fp32"):
        ops.quantize_4bit(w, backend=backend)
    q = ops.quantize_4bit(w, double_quant=False, backend=backend)
    assert torch.equal(ops.dequantize_4bit(q, backend=backend), w)


@pytest.mark.skipif("cpp" not in backends("linear4bit_fwd"), reason="the extension is not built")
@pytest.mark.parametrize("isa", isas())
def test_fp16_is_not_multiplied_in_bytes(isa):
    """Which have one scale for 64 values: 2^-15 of the greatest, where fp16 keeps 2^-12 of each."""
    w, x = normal(16, 128), normal(1, 128, std=2e-2).half()
    w[:, 5], x[0, 5] = 0.0, 1024.0  # the greatest meets no weight
    q = ops.quantize_4bit(w, double_quant=False)
    with running(isa):
        y = ops.linear4bit(x, q, backend="cpp").double()
    torch.testing.assert_close(y, x.double() @ ops.dequantize_4bit(q).double().T, rtol=2e-3, atol=1e-4)


@pytest.mark.skipif("cpp" not in backends("lora_shrink"), reason="the extension is not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_bytes_do_not_depend_on_the_number_of_threads(dtype):
    """Of our own kernels: work is cut by shape alone. (The vendor GEMM's may.)"""
    x, dy, seed = normal(517, 300, dtype=dtype), normal(517, 210, dtype=dtype), torch.tensor(7)
    a, b, bias, row = normal(5, 300), normal(210, 5), normal(210), normal(1, 512, dtype=dtype)
    q = ops.quantize_4bit(normal(192, 512))

    def all_of():
        s = ops.lora_shrink(x, a, 0.1, seed, backend="cpp")
        ds, *others = ops.lora_grad_b(dy, s, b, scale=0.7, backend="cpp")
        grads = ops.lora_grad_a(x, ds, a, 0.1, seed, backend="cpp")
        y = ops.lora_expand(s, b, bias, scale=0.7, backend="cpp")
        return [s, ds, *others, *grads, y, ops.linear4bit(row, q, backend="cpp"), ops.dequantize_4bit(q, backend="cpp")]

    one = all_of()
    try:
        for threads in (2, 3):
            torch.set_num_threads(threads)
            assert all(torch.equal(new, old) for new, old in zip(all_of(), one, strict=True))
    finally:
        torch.set_num_threads(1)
