"""lora_conv1d/2d/3d against the definition in fp64, in both memory formats; paths, graphs, what is saved, errors."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from conv_cases import CASES, CONV, ConvCase, definition, make
from fastpeft import ops, testing
from fastpeft.ops import _library
from fastpeft.ops._calls import draw_seed

OPS = (ops.lora_conv1d, ops.lora_conv2d, ops.lora_conv3d)
LINE = ConvCase("line", (9,), 8, 12, 3, (5,), {"stride": 2, "padding": 2})
NAMES = ("x", "weight", "lora_A", "lora_B", "bias", "lora_bias")
CASE = CASES[0]


def seed_after(manual):
    torch.manual_seed(manual)
    return draw_seed("cpu")


def gradients(call, tensors, dy=None):
    """y and the gradient of each tensor."""
    leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in tensors]
    y = call(*leaves)
    y.backward(torch.ones_like(y) if dy is None else dy.to(y.dtype))
    return {"y": y.detach()} | {f"d{name}": leaf.grad for name, leaf in zip(NAMES, leaves, strict=True)}


def ours(case, tensors, dy=None, manual=5, **options):
    def call(*leaves):
        torch.manual_seed(manual)
        return OPS[len(case.kernel) - 1](*leaves, **case.options, scale=0.7, **options)

    return gradients(call, tensors, dy)


def plain(case, tensors, dtype, dy=None, p=0.0, manual=5):
    seed = seed_after(manual) if p else None
    call = lambda *leaves: definition(*leaves, 0.7, p, seed, **case.options)  # noqa: E731
    return gradients(call, [t.to(dtype) for t in tensors], dy)


def served(dtype):
    return ["eager", *(name for name in testing.backends("conv_shrink", "cpu", dtype) if name != "triton")]


@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [*CASES[:4], LINE], ids=str)
def test_forward_backward(case, dtype, p, last):
    tensors = make(case, dtype, last=last and case is not LINE)
    like = CONV[len(case.kernel) - 1](tensors[0], tensors[1], **case.options)
    dy = torch.randn_like(like)
    gold, peer = plain(case, tensors, torch.float64, dy, p), plain(case, tensors, dtype, dy, p)
    for backend in served(dtype):
        got = ours(case, tensors, dy, dropout=p, backend=backend, path="accumulate")
        assert got["y"].dtype == got["dx"].dtype == got["dweight"].dtype == dtype
        assert got["dlora_A"].dtype == got["dlora_B"].dtype == torch.float32
        assert got["y"].stride() == like.stride()
        testing.assert_all_within_budget(got, peer, gold, dtype)


@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_images(dtype, last):
    """Images that change their format one by one."""
    case = ConvCase("", (22, 24), 8, 9, 3, (3, 3), {"padding": 1})
    tensors = make(case, dtype, last=last)
    dy = torch.randn_like(F.conv2d(tensors[0], tensors[1], padding=1))
    gold, peer = plain(case, tensors, torch.float64, dy), plain(case, tensors, dtype, dy)
    for path in ("accumulate", "merged") if dtype == torch.float32 else ("accumulate",):
        got = ours(case, tensors, dy, path=path)
        assert got["y"].stride() == dy.stride() and got["dx"].stride() == tensors[0].stride()
        testing.assert_all_within_budget(got, peer, gold, dtype)


def test_triton():
    if "triton" not in testing.backends("conv_shrink"):
        pytest.skip("triton is not here, or not interpreted")
    case = ConvCase("", (3, 3), 6, 5, 2, (2, 2), {"padding": 1})
    tensors = make(case, torch.float32)
    gold = plain(case, tensors, torch.float64, p=0.3)
    got = ours(case, tensors, dropout=0.3, backend="triton")
    testing.assert_all_within_budget(got, plain(case, tensors, torch.float32, p=0.3), gold, torch.float32)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [2, (1, 2), "same", "valid"], ids=str)
def test_padding(mode, padding):
    """As torch's own layer pads, even kernels and "same" included."""
    conv = torch.nn.Conv2d(4, 6, (2, 3), padding=padding, padding_mode=mode)
    x, a, b = torch.randn(2, 4, 5, 6), torch.randn(2, 24), torch.randn(6, 2)
    y = ops.lora_conv2d(x, conv.weight, a, b, conv.bias, padding=padding, padding_mode=mode, scale=0.5)
    with torch.no_grad():
        conv.weight += 0.5 * (b @ a).view_as(conv.weight)
        torch.testing.assert_close(y, conv(x))


@pytest.mark.parametrize("kernel", [(3, 3), (1, 1)], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_update_is_one_matrix(kernel, stride):
    """ΔW = scale · (B A): the document's fold raises at 64 outputs, and broadcasts a wrong result at 9 of 3 × 3."""
    case = ConvCase("", (6, 6), 3, 9, 4, kernel, {"stride": stride})
    x, weight, a, b, *_ = make(case, torch.float64)
    y = ops.lora_conv2d(x, weight, a.double(), b.double(), scale=0.01, **case.options)
    merged = weight + 0.01 * (b.double() @ a.double()).view_as(weight)
    torch.testing.assert_close(y, torch.conv2d(x, merged, **case.options))


@pytest.mark.parametrize("backend", served(torch.float32))
def test_unbatched_and_empty(backend):
    tensors = make(CASE, torch.float32)
    batched = ops.lora_conv2d(*tensors, **CASE.options, backend=backend)
    single = ops.lora_conv2d(tensors[0][1], *tensors[1:], **CASE.options, backend=backend)
    torch.testing.assert_close(single, batched[1])
    got = ours(CASE, (tensors[0][:0], *tensors[1:]), dropout=0.1, backend=backend)
    assert got["y"].shape == (0, *batched.shape[1:]) and got["dx"].shape == (0, *tensors[0].shape[1:])
    assert not any(got[name].any() for name in ("dlora_A", "dlora_B", "dweight", "dbias"))


def strategies(call):
    seen = []
    with _library.watching(seen.append):
        call()
    return [each.strategy.split(":")[0] for each in seen if each.op.startswith("lora_conv")]


@pytest.mark.cpp
def test_paths(monkeypatch):
    tensors = make(ConvCase("", (12, 12), 16, 16, 4, (3, 3)), torch.float32)
    case = ConvCase("", (12, 12), 16, 16, 4, (3, 3))
    accumulated, merged = (ours(case, tensors, path=path) for path in ("accumulate", "merged"))
    testing.assert_all_within_budget(merged, accumulated, plain(case, tensors, torch.float64), torch.float32)
    call = lambda *t, **options: strategies(lambda: ops.lora_conv2d(*t, **options))  # noqa: E731
    half = [t.bfloat16() for t in tensors]
    served_here = served(torch.float32) != ["eager"]
    assert call(*tensors) == ["merged" if served_here else "accumulate"]
    # What rounding would lose, a mask forbids, or costs more than it saves.
    assert call(*half) == call(*tensors, dropout=0.1) == call(tensors[0][:, :, :3, :3], *tensors[1:]) == ["accumulate"]
    with torch.autocast("cpu", torch.bfloat16):
        assert call(*tensors) == ["accumulate"]
    assert call(*half, path="merged") == ["merged"]
    with pytest.raises(ValueError, match="lora_conv2d: path must be another where dropout is not 0, got 'merged'"):
        ops.lora_conv2d(*tensors, dropout=0.1, path="merged")


@pytest.mark.parametrize("factors", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_mixed_dtypes(factors):
    tensors = make(CASE, torch.float32, factors=factors)
    got = ours(CASE, tensors, path="accumulate")
    low = torch.float32 if factors == torch.float64 else factors
    assert got["dlora_A"].dtype == got["dlora_B"].dtype == got["dlora_bias"].dtype == factors
    testing.assert_all_within_budget(got, plain(CASE, tensors, low), plain(CASE, tensors, torch.float64), low)


def test_autocast():
    tensors = make(CASE, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = ours(CASE, tensors)
    assert got["y"].dtype == torch.bfloat16 and got["dx"].dtype == got["dlora_A"].dtype == torch.float32
    peer, gold = plain(CASE, tensors, torch.bfloat16), plain(CASE, tensors, torch.float64)
    testing.assert_all_within_budget(got, peer, gold, torch.bfloat16)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_compile(p):
    tensors = make(CASE, torch.float32)
    options = {**CASE.options, "scale": 0.7, "dropout": p, "path": "accumulate" if p else "auto"}
    graph = torch.compile(lambda *t: ops.lora_conv2d(*t, **options), fullgraph=True, backend="aot_eager")
    torch.manual_seed(3)
    got = gradients(graph, tensors)
    gold, peer = (plain(CASE, tensors, dtype, p=p, manual=3) for dtype in (torch.float64, torch.float32))
    testing.assert_all_within_budget(got, peer, gold, torch.float32)


def test_checkpoint():
    """The mask of the recomputed forward is that of the first."""
    tensors = make(CASE, torch.float32)

    def call(*leaves):
        return ops.lora_conv2d(*leaves, **CASE.options, dropout=0.4)

    torch.manual_seed(1)
    want = gradients(call, tensors)
    torch.manual_seed(1)
    got = gradients(lambda *leaves: checkpoint(call, *leaves, use_reentrant=False), tensors)
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize(("trained", "kept"), [((0,), ()), ((3,), ("s",)), ((2,), ("x",)), ((0, 2, 3), ("x", "s"))])
def test_saved(trained, kept):
    """x for A, s for B, nothing for x alone; no gradient where none is asked for."""
    tensors = make(CASE, torch.bfloat16)
    leaves = [t.clone().requires_grad_(i in trained) for i, t in enumerate(tensors)]
    held = []
    own = {t.untyped_storage().data_ptr() for t in leaves[1:]}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or t, lambda t: t):
        y = ops.lora_conv2d(*leaves, **CASE.options, scale=0.7)
    beside = [t for t in held if t.untyped_storage().data_ptr() not in own]
    sizes = {"x": leaves[0].numel(), "s": y[:, 0].numel() * CASE.R}
    assert sorted(t.numel() for t in beside) == sorted(sizes[name] for name in kept)
    assert all(t.data_ptr() == leaves[0].data_ptr() for t in beside if t.numel() == sizes["x"])
    y.sum().backward()
    full = ours(CASE, tensors, torch.ones_like(y), path="accumulate")
    for i, (name, leaf) in enumerate(zip(NAMES, leaves, strict=True)):
        assert (leaf.grad is not None) == (i in trained), name
        assert leaf.grad is None or torch.equal(leaf.grad, full[f"d{name}"])


def test_scale_tensor():
    tensors, scale = make(CASE, torch.float32), torch.tensor(0.7, requires_grad=True)
    y = ops.lora_conv2d(*tensors, **CASE.options, scale=scale)
    torch.testing.assert_close(y, definition(*tensors, 0.7, **CASE.options))
    y.sum().backward()
    update = definition(*tensors, 1.0, **CASE.options) - F.conv2d(tensors[0], tensors[1], tensors[4], **CASE.options)
    torch.testing.assert_close(scale.grad, update.sum())


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"x": torch.ones(4, 5)}, ValueError, r"x must have shape \[N, C, \*in"),
        ({"x": torch.ones(1, 4, 5, 5, dtype=torch.int32)}, TypeError, "x must be float32"),
        ({"weight": torch.ones(6, 4, 3)}, ValueError, r"weight must have shape \[out, in / groups, \*kernel\]"),
        ({"weight": torch.ones(6, 4, 3, 3).half()}, TypeError, "weight must have the dtype of x, torch.float32"),
        (
            {"lora_A": torch.ones(2, 35)},
            ValueError,
            r"lora_A must have shape \[rank, in / groups · kernel\] = \[any, 36\]",
        ),
        ({"lora_B": torch.ones(6, 3)}, ValueError, r"lora_B must have shape \[out_features, rank\] = \[6, 2\]"),
        ({"bias": torch.ones(5)}, ValueError, r"bias must have shape \[out_channels\] = \[6\], got \[5\]"),
        ({"groups": 3}, ValueError, "groups must divide the 4 channels of x, got 3"),
        ({"groups": 2.0}, TypeError, "groups must be an int, got 2.0"),
        ({"stride": 2, "padding": "same"}, ValueError, 'stride must be 1 where padding is "same", got 2'),
        ({"padding": "full"}, ValueError, "padding must be one of valid, same, got 'full'"),
        ({"padding_mode": "mirror"}, ValueError, "padding_mode must be one of zeros, reflect, replicate, circular"),
        ({"dropout": 1.0}, ValueError, r"dropout must be in \[0, 1\), got 1.0"),
        ({"path": "fold"}, ValueError, "path must be one of auto, accumulate, merged, got 'fold'"),
        ({"backend": "cudnn"}, ValueError, "backend must be one of"),
        ({"scale": "2"}, TypeError, "scale must be a real number or a 0-d tensor"),
    ],
    ids=str,
)
def test_bad_input(change, error, text):
    call = {
        "x": torch.ones(1, 4, 5, 5), "weight": torch.ones(6, 4, 3, 3), "lora_A": torch.ones(2, 36), "lora_B": torch.ones(6, 2),
    }  # fmt: skip
    with pytest.raises(error, match=f"^lora_conv2d: {text}"):
        ops.lora_conv2d(**{**call, **change})


TRAINED = [(0, 1, 2, 3), (0, 3), (0, 2), (2, 3), (0,)]


@pytest.mark.parametrize("trained", TRAINED, ids=str)
@pytest.mark.parametrize(
    ("case", "options"), [(CASES[0], {}), (CASES[2], {"dropout": 0.3}), (CASES[0], {"path": "merged"})]
)
def test_twice(case, options, trained):
    """Gradients of gradients are those of the definition, whatever is frozen."""
    options, p = {"path": "accumulate", **options}, options.get("dropout", 0.0)
    values, seed = make(case, torch.float32), seed_after(5)

    def second(call, dtype):
        leaves = [t.to(dtype, copy=True).requires_grad_(i in trained) for i, t in enumerate(values)]
        own = [leaves[i] for i in trained]
        first = torch.autograd.grad(call(*leaves).square().sum(), own, create_graph=True)
        return dict(enumerate(torch.autograd.grad(sum(g.square().sum() for g in first), own)))

    def ours(*leaves):
        torch.manual_seed(5)
        return ops.lora_conv2d(*leaves, **case.options, scale=0.7, **options)

    plain = lambda *leaves: definition(*leaves, 0.7, p, seed, **case.options)  # noqa: E731
    gold, peer = second(plain, torch.float64), second(plain, torch.float32)
    testing.assert_all_within_budget(second(ours, torch.float32), peer, gold, torch.float32)


def test_transforms():
    values = make(CASE, torch.float32)
    call = lambda b: ops.lora_conv2d(*values[:3], b, **CASE.options)  # noqa: E731
    want = lambda b: definition(*values[:3], b, None, torch.zeros(1), 1.0, **CASE.options)  # noqa: E731
    b = values[3]
    torch.testing.assert_close(torch.func.jacrev(call)(b), torch.func.jacrev(want)(b))
    tangent = torch.randn_like(b)
    torch.testing.assert_close(torch.func.jvp(call, (b,), (tangent,)), torch.func.jvp(want, (b,), (tangent,)))
    stacked = torch.stack([b, 2 * b])
    torch.testing.assert_close(torch.func.vmap(call)(stacked), torch.stack([call(each) for each in stacked]))
