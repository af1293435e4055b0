"""fastpeft.ops.lora_linear: forward and every gradient against the reference, and each contract of DESIGN.md."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from cases import FLOATS, backend_cases, linear_call, normal, wide
from fastpeft import ops
from fastpeft.ops._calls import draw_seed
from fastpeft.reference.dropout import keep_factor, keep_mask
from fastpeft.testing import assert_all_within_budget, assert_within_budget, backends

OP = "lora_linear_fwd"


def values(case, dtype, adapter, biases=True):
    K, N, R = case.K, case.N, case.R
    return {
        "x": normal(case.M, K, dtype=dtype),
        "weight": normal(N, K, dtype=dtype, std=K**-0.5),
        "lora_A": normal(R, K, dtype=adapter, std=K**-0.5),
        "lora_B": normal(N, R, dtype=adapter),
        "bias": normal(N, dtype=dtype) if biases else None,
        "lora_bias": normal(N, dtype=adapter) if biases else None,
        "dy": normal(case.M, N, dtype=dtype),
    }


def compare(given, backend, dtype, *, p, seed=11, scale=0.7):
    ours = linear_call(given, backend, scale=scale, p=p, seed=seed)
    peer = linear_call(given, "eager", scale=scale, p=p, seed=seed)
    gold = linear_call(wide(given, torch.float64), "eager", scale=scale, p=p, seed=seed)
    assert_all_within_budget(ours, peer, gold, dtype)
    for name, value in ours.items():
        source = {"y": "x"}.get(name, name[1:])
        assert value.dtype == given[source].dtype, name


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize(("backend", "case", "dtype"), backend_cases(OP))
def test_forward_backward(backend, case, dtype, p, poisoned):
    compare(values(case, dtype, torch.float32), backend, dtype, p=p)


@pytest.mark.parametrize("adapter", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("backend", "case", "dtype"), [c for c in backend_cases(OP) if "odd" in c.id])
def test_mixed_adapter_dtype(backend, case, dtype, adapter, poisoned):
    if backend == "triton" and adapter is torch.bfloat16:
        adapter = torch.float16
    compare(values(case, dtype, adapter, biases=False), backend, dtype, p=0.1)


@pytest.mark.cpp
@pytest.mark.parametrize("rank", [1, 2, 3, 8, 24, 64, 100, 256, 300])
def test_ranks(rank, poisoned):
    from cases import Case

    compare(values(Case(50, 70, 90, rank, "rank"), torch.float32, torch.float32), "cpp", torch.float32, p=0.1)


@pytest.mark.parametrize("backend", [name for name in backends(OP) if name == "cpp"])
def test_more_rows_than_a_mask_has_room_for(backend, poisoned):
    """A rank at which 97 rows still are few, in the eyes of an adapter that is read as it lies."""
    from cases import Case

    compare(values(Case(97, 40, 8, 1552, "rank"), torch.float32, torch.float32), backend, torch.float32, p=0.1)


@pytest.mark.parametrize("M", [1, 2, 3, 18])
@pytest.mark.parametrize("backend", [name for name in backends(OP) if name == "cpp"])
def test_few_rows_of_a_transposed_weight(backend, M):
    """Conv1D's storage, for which a vendor's GEMM may add term by term to what y holds."""
    for seed in range(6):
        torch.manual_seed(seed)
        N, K, R = (2304, 768, 8) if M < 18 else (2, 768, 8)
        given = {"x": normal(M, K), "weight": normal(K, N, std=K**-0.5).t(), "lora_A": normal(R, K, std=K**-0.5),
                 "lora_B": normal(N, R), "bias": normal(N), "dy": normal(M, N)}  # fmt: skip
        compare(given, backend, torch.float32, p=0.0)


@pytest.mark.parametrize("backend", backends(OP))
def test_strides(backend, poisoned):
    """x a view into a wider tensor, A and B transposed, W in [K, N] storage (Conv1D), dy expanded."""
    M, K, N, R = 19, 40, 24, 5
    given = values_of = {
        "x": normal(M, K),
        "weight": normal(N, K, std=0.2),
        "lora_A": normal(K, R, std=0.2).t(),
        "lora_B": normal(R, N).t(),
        "dy": normal(1, N).expand(M, N),
    }
    compare(given, backend, torch.float32, p=0.0)
    gold = ops.lora_linear(*(values_of[k] for k in ("x", "weight", "lora_A", "lora_B")), backend="eager")
    wider = torch.cat([values_of["x"], torch.full((M, 8), torch.nan)], dim=1)[:, :K]
    across = values_of["x"].t().contiguous().t()
    for x in (wider, across):
        stored = values_of["weight"].t().contiguous().t()
        y = ops.lora_linear(x, stored, values_of["lora_A"], values_of["lora_B"], backend=backend)
        torch.testing.assert_close(y, gold)
    biases = normal(N, 2)[:, 0], normal(1).expand(N)
    dense = [bias.contiguous() for bias in biases]
    y, z = (ops.lora_linear(*(values_of[k] for k in ("x", "weight", "lora_A", "lora_B")), *both, backend=backend)
            for both in (biases, dense))  # fmt: skip
    assert torch.equal(y, z)


@pytest.mark.parametrize("backend", ["eager", *backends(OP)])
@pytest.mark.parametrize("shape", [(12,), (3, 12), (2, 3, 12), (2, 1, 3, 12), (2, 0, 12)])
def test_leading_dimensions(backend, shape):
    w, a, b = normal(5, 12), normal(3, 12), normal(5, 3)
    x = normal(*shape).requires_grad_()
    y = ops.lora_linear(x, w, a, b, scale=2.0, backend=backend)
    assert y.shape == (*shape[:-1], 5)
    torch.testing.assert_close(y, x @ w.t() + 2.0 * (x @ a.t() @ b.t()))
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert gradient.shape == x.shape


def test_gradcheck():
    x, w, a, b = (normal(*shape, dtype=torch.float64).requires_grad_() for shape in ((4, 6), (5, 6), (2, 6), (5, 2)))
    bias, lora_bias = (normal(5, dtype=torch.float64).requires_grad_() for _ in range(2))

    def call(*args):
        torch.manual_seed(1)
        return ops.lora_linear(*args, scale=0.5, dropout=0.3)

    assert torch.autograd.gradcheck(call, (x, w, a, b, bias, lora_bias))


@pytest.mark.parametrize("backend", ["eager", *backends(OP)])
def test_tensor_scale(backend):
    x, w, a, b = normal(4, 6), normal(5, 6), normal(2, 6), normal(5, 2)
    y = ops.lora_linear(x, w, a, b, scale=torch.tensor(0.5), backend=backend)
    torch.testing.assert_close(y, ops.lora_linear(x, w, a, b, scale=0.5, backend=backend))


@pytest.mark.parametrize("backend", ["eager", *backends(OP)])
@pytest.mark.parametrize("wanted", [("x",), ("lora_A",), ("lora_B",), ("bias",), ("lora_bias",), ("weight",)])
def test_only_what_is_needed(backend, wanted):
    """A frozen tensor gets no gradient, and x is kept only for A and W, s only for B."""
    from cases import Case

    given = values(Case(6, 20, 10, 4, "need"), torch.float32, torch.float32)
    dy = given.pop("dy")
    leaves = {name: value.clone().requires_grad_(name in wanted) for name, value in given.items()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = ops.lora_linear(*leaves.values(), dropout=0.1, backend=backend)
    shapes = [tuple(t.shape) for t in kept]
    assert (shapes.count((6, 20)) == 1) == (wanted[0] in ("lora_A", "weight"))
    assert ((6, 4) in shapes) == (wanted == ("lora_B",))
    y.backward(dy)
    assert [name for name, leaf in leaves.items() if leaf.grad is not None] == list(wanted)


@pytest.mark.cpp
def test_bytes_kept_for_a_triple(poisoned):
    """q, k and v on one bf16 x with dropout: x once, three thin s, three seeds; 2.2 bytes a token and channel at most."""
    M, K, R = 64, 768, 8
    x = normal(M, K, dtype=torch.bfloat16).requires_grad_()
    layers = [
        [normal(n, K, dtype=torch.bfloat16), normal(R, K).requires_grad_(), normal(n, R).requires_grad_()]
        for n in (768, 64, 64)
    ]
    parameters = {t.untyped_storage().data_ptr() for layer in layers for t in layer}
    storages = {}

    def keep(t):
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        outputs = [ops.lora_linear(x, w, a, b, dropout=0.1, backend="cpp") for w, a, b in layers]
    total = sum(size for pointer, size in storages.items() if pointer not in parameters)
    assert 2.0 <= total / (M * K) <= 2.2
    sum(y.float().sum() for y in outputs).backward()


@pytest.mark.cpp
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", FLOATS)
def test_deterministic(dtype, p):
    from cases import Case

    given = values(Case(700, 96, 80, 8, "tasks"), dtype, torch.float32)
    first, second = (linear_call(given, "cpp", scale=1.0, p=p, seed=3) for _ in range(2))
    torch.set_num_threads(2)
    try:
        third = linear_call(given, "cpp", scale=1.0, p=p, seed=3)
    finally:
        torch.set_num_threads(1)
    for name in first:
        assert torch.equal(first[name], second[name]), name
        if name not in ("y", "dx") or dtype != torch.float32:  # the vendor GEMM may split its sum by threads
            assert torch.equal(first[name], third[name]), name


@pytest.mark.parametrize("backend", ["eager", *backends(OP)])
def test_dropout_is_the_mask_of_the_seed(backend):
    """The seed is one draw of torch's generator: with it, the mask, y and every gradient can be written down."""
    M, K, N, R, p = 21, 300, 17, 4, 0.25
    x, w, a, b, dy = normal(M, K), normal(N, K), normal(R, K, std=0.1), normal(N, R), normal(M, N)
    torch.manual_seed(5)
    mask = keep_mask(draw_seed("cpu"), M, K, p, "cpu") * keep_factor(p)

    def written_down(dtype):
        leaves = [t.detach().clone().to(dtype).requires_grad_() for t in (x, a, b)]
        y = leaves[0] @ w.to(dtype).t() + (leaves[0] * mask.to(dtype)) @ leaves[1].t() @ leaves[2].t()
        y.backward(dy.to(dtype))
        return {"y": y.detach()} | dict(zip(("dx", "dlora_A", "dlora_B"), (t.grad for t in leaves), strict=True))

    given = {"x": x, "weight": w, "lora_A": a, "lora_B": b, "dy": dy}
    ours = linear_call(given, backend, scale=1.0, p=p, seed=5)
    assert_all_within_budget(ours, written_down(torch.float32), written_down(torch.float64), torch.float32)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("backend", backends(OP))
def test_checkpoint_draws_the_same_mask(backend, reentrant):
    w, a, b = normal(8, 40), normal(2, 40).requires_grad_(), normal(8, 2).requires_grad_()
    x = normal(6, 40).requires_grad_()

    def call(t):
        return ops.lora_linear(t, w, a, b, dropout=0.5, backend=backend)

    torch.manual_seed(9)
    plain = torch.autograd.grad(call(x).square().sum(), (x, a, b))
    torch.manual_seed(9)
    y = checkpoint(call, x, use_reentrant=reentrant).square().sum()
    y.backward()
    for value, gold in zip((x.grad, a.grad, b.grad), plain, strict=True):
        assert torch.equal(value, gold)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["eager", "cpp"])
def test_autocast(backend, dtype):
    """fp32 everything under autocast: the output in autocast's dtype, gradients in the parameters' own."""
    from cases import Case

    given = values(Case(16, 64, 32, 8, "autocast"), torch.float32, torch.float32)
    dy = given.pop("dy")
    leaves = {name: value.clone().requires_grad_() for name, value in given.items()}
    with torch.autocast("cpu", dtype=dtype):
        y = ops.lora_linear(*leaves.values(), scale=0.5, backend=backend)
        assert y.dtype == dtype
    y.backward(dy.to(dtype))
    assert all(leaf.grad.dtype == torch.float32 for leaf in leaves.values())
    low = {name: value.to(dtype) for name, value in given.items()}
    gold = ops.lora_linear(*(v.double() for v in given.values()), scale=0.5)
    peer = ops.lora_linear(*low.values(), scale=0.5, backend="eager")
    assert_within_budget(y, peer, gold, dtype)


@pytest.mark.parametrize("p", [0.0, 0.2])
@pytest.mark.parametrize("backend", ["eager", *backends(OP)])
def test_compile(backend, p):
    w, a, b = normal(8, 16), normal(2, 16).requires_grad_(), normal(8, 2).requires_grad_()
    x = normal(3, 5, 16).requires_grad_()

    def call(t):
        return ops.lora_linear(t.sin(), w, a, b, scale=2.0, dropout=p, backend=backend).square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.manual_seed(2)
    gold = torch.autograd.grad(call(x), (x, a, b))
    torch.manual_seed(2)
    for value, expected in zip(torch.autograd.grad(compiled(x), (x, a, b)), gold, strict=True):
        torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("backend", ["eager", *backends(OP)])
def test_registration(backend):
    x, w, a, b, s = normal(4, 6), normal(5, 6), normal(2, 6), normal(5, 2), normal(4, 2)
    seed = torch.tensor(3)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    for p, given in ((0.0, None), (0.2, seed)):
        args = (x, w, a, b, None, None, 0.5, p, given, backend)
        torch.library.opcheck(torch.ops.fastpeft.lora_linear_fwd.default, args, test_utils=checks)
        for need in ((True, True, True, True), (False, True, False, False)):
            args = (normal(4, 5), x, w, a, b, s, 0.5, p, given, *need, None, None, backend)
            torch.library.opcheck(torch.ops.fastpeft.lora_linear_bwd.default, args, test_utils=checks)


def test_backward_leaves_saved_tensors_alone():
    x, w, a, b = (normal(*s).requires_grad_() for s in ((4, 6), (5, 6), (2, 6), (5, 2)))
    y = ops.lora_linear(x, w, a, b, dropout=0.1).sum()
    before = x.detach().clone()
    first = torch.autograd.grad(y, (x, w, a, b), retain_graph=True)
    second = torch.autograd.grad(y, (x, w, a, b))
    assert torch.equal(x, before)
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))
