"""LoRAMultiheadAttention: torch's attention with merged weights is the truth, in every calling form."""

import copy
import pickle

import pytest
import torch
from torch import nn

from fastpeft import LoRAMultiheadAttention, lora_disabled
from fastpeft.nn import LoRALinear
from fastpeft.testing import assert_within_budget

# The module's options, and what is different from a self-attention of one batch-first x in the call.
CASES = {
    "self": ({}, {}),
    "seq first": ({"batch_first": False}, {}),
    "unbatched": ({}, {"batched": False}),
    "key is value": ({"batch_first": False}, {"inputs": 2}),
    "three inputs": ({"bias": False}, {"inputs": 3}),
    "kdim vdim": ({"kdim": 6, "vdim": 10}, {"inputs": 3}),
    "kdim seq first": ({"kdim": 6, "vdim": 10, "bias": False, "batch_first": False}, {"inputs": 3, "padding": True}),
    "bias_kv zero": ({"add_bias_kv": True, "add_zero_attn": True}, {"mask": 2, "padding": True}),
    "2-D bool": ({}, {"mask": 2}),
    "3-D float": ({"batch_first": False}, {"mask": 3, "floats": True}),
    "3-D unbatched": ({}, {"mask": 3, "padding": True, "batched": False}),
    "float padding": ({}, {"padding": True, "floats": True}),
    "both masks": ({}, {"mask": 3, "padding": True}),
    "causal": ({}, {"mask": 2, "causal": True}),
    "causal padded": ({}, {"mask": 2, "causal": True, "padding": True}),
}
E, HEADS, N, L, S = 8, 2, 3, 4, 5


def build(dtype=torch.float64, dropout=0.0, targets=("in_proj", "out_proj"), lora_bias=False, **options):
    torch.manual_seed(0)
    base = nn.MultiheadAttention(E, HEADS, **{"batch_first": True, "dtype": dtype, **options})
    module = LoRAMultiheadAttention.from_attention(base, rank=2, dropout=dropout, targets=targets, lora_bias=lora_bias)
    for name, parameter in module.named_parameters():
        if "lora_B" in name or "lora_bias" in name:
            nn.init.normal_(parameter, 0, 0.3)
    return module


def arguments(module, inputs=1, batched=True, mask=0, padding=False, floats=False, causal=False):
    long = L if inputs == 1 else S
    widths = (E, module.kdim, module.vdim)
    xs = []
    for width, steps in list(zip(widths, (L, long, long), strict=True))[:inputs]:
        shape = (N, steps, width) if module.batch_first else (steps, N, width)
        dtype = next(module.parameters()).dtype
        xs.append(torch.randn(shape if batched else (steps, width), dtype=dtype, requires_grad=True))
    xs += [xs[-1]] * (3 - inputs)
    count, options = N if batched else 1, {"is_causal": causal}
    if mask:
        hide = torch.ones(L, long, dtype=torch.bool).triu(1)
        hide = hide if mask == 2 else hide.expand(count * HEADS, L, long).clone()
        options["attn_mask"] = torch.randn(hide.shape, dtype=xs[0].dtype) if floats else hide
    if padding:
        hide = torch.zeros(count, long, dtype=torch.bool)
        hide[-1, 3:] = True
        hide = hide if batched else hide[0]
        options["key_padding_mask"] = torch.randn(hide.shape, dtype=xs[0].dtype) if floats else hide
    return xs, options


@pytest.mark.parametrize("case", CASES)
def test_is_torchs_with_merged_weights(case):
    options, call = CASES[case]
    module = build(lora_bias=options.get("bias", True), **options)
    truth = module.to_attention().train()
    xs, given = arguments(module, **call)
    for more in ({}, {"average_attn_weights": False}, {"need_weights": False}):
        if call.get("causal") and options.get("add_bias_kv"):
            continue
        (ours, weights), (gold, gold_weights) = module(*xs, **given, **more), truth(*xs, **given, **more)
        assert ours.shape == gold.shape and (weights is None) == (gold_weights is None)
        torch.testing.assert_close(ours, gold)
        if weights is not None:
            torch.testing.assert_close(weights, gold_weights)
        leaves = list({id(x): x for x in xs}.values())
        dy = torch.randn_like(gold)
        for mine, theirs in zip(
            torch.autograd.grad(ours, leaves, dy), torch.autograd.grad(gold, leaves, dy), strict=True
        ):
            torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(
    ("options", "names"), [({}, ("in_proj",)), ({"kdim": 6, "vdim": 10}, ("q_proj", "k_proj", "v_proj"))]
)
def test_gradients_of_the_factors(options, names):
    """dA and dB are those of W + scaling · B A in torch's attention."""
    module = build(**options)
    xs, _ = arguments(module, inputs=3)
    module(*xs)[0].square().sum().backward()
    truth = module.to_attention().train()
    changed = {}
    for name in (*names, "out_proj"):
        part = module.parts()[name]
        a, b = part.lora_A.detach().requires_grad_(), part.lora_B.detach().requires_grad_()
        key = f"{name}.weight" if name == "out_proj" else f"{name}_weight"
        changed[name] = (a, b, key, module.get_parameter(key).detach() + part.scaling * b @ a)
    merged = {key: weight for _, _, key, weight in changed.values()}
    torch.func.functional_call(truth, merged, tuple(xs))[0].square().sum().backward()
    for name, (a, b, _, _) in changed.items():
        torch.testing.assert_close(module.parts()[name].lora_A.grad, a.grad, msg=name)
        torch.testing.assert_close(module.parts()[name].lora_B.grad, b.grad, msg=name)


def test_identity_at_init_and_frozen():
    base = nn.MultiheadAttention(E, HEADS, batch_first=True)
    x = torch.randn(N, L, E)
    before = base(x, x, x)[0]
    module = LoRAMultiheadAttention.from_attention(base)
    torch.testing.assert_close(module.eval()(x, x, x)[0], before)
    assert isinstance(module, nn.MultiheadAttention) and isinstance(module.out_proj, LoRALinear)
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    assert trained == {f"{part}.lora_{x}" for part in ("in_proj", "out_proj") for x in "AB"}
    assert module.in_proj.lora_A.shape == (16, E) and module.in_proj.lora_B.shape == (3 * E, 16)
    assert module.in_proj.scaling == 2.0 and module.in_proj.dropout_probability == 0.05 and module.dropout == 0.0


def test_one_product_for_one_x(monkeypatch):
    """Self-attention runs in_proj once and merges nothing; three inputs read A three times."""
    from fastpeft.nn.factors import base
    from fastpeft.nn.layers import lora_attention

    calls = []
    for where in (base, lora_attention):
        real = where.lora_linear
        monkeypatch.setattr(
            where, "lora_linear", lambda *args, real=real, **kw: calls.append(args[1].shape) or real(*args, **kw)
        )
    module = build(torch.float32)
    x = torch.randn(N, L, E)
    module(x, x, x, need_weights=False)
    assert calls == [(3 * E, E), (E, E)]
    calls.clear()
    module(x, x.clone(), x.clone())
    assert calls == [(E, E)] * 4


def test_states_and_merge(tmp_path):
    module = build(lora_bias=True, dropout=0.1).eval()
    x = torch.randn(N, L, E, dtype=torch.float64)
    y = module(x, x, x)[0]
    keys = {"in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"}
    state = {key: value.clone() for key, value in module.state_dict().items()}
    assert keys < state.keys() and all("lora_" in key for key in state.keys() - keys)
    missing = module.load_state_dict(nn.MultiheadAttention(E, HEADS).state_dict(), strict=False)
    assert not missing.unexpected_keys and all("lora_" in key for key in missing.missing_keys)
    other = build(lora_bias=True)
    other.load_state_dict(state)
    module.load_state_dict(state)
    torch.testing.assert_close(other.eval()(x, x, x)[0], y, rtol=0, atol=0)
    assert set(module.merge()) == {"in_proj", "out_proj"} and module.merged
    torch.testing.assert_close(module(x, x, x)[0], y)
    merged = module.state_dict()
    assert list(merged) == list(state) and all(torch.equal(merged[key], state[key]) for key in state)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        twin.unmerge()
        torch.testing.assert_close(twin(x, x, x)[0], y, rtol=0, atol=0)
    with lora_disabled(module):
        assert not module.merged
    assert module.merged
    module.train()
    assert not module.merged
    module.disable()
    base = nn.MultiheadAttention(E, HEADS, batch_first=True, dtype=torch.float64)
    base.requires_grad_(False).load_state_dict({key: state[key] for key in keys})
    torch.testing.assert_close(module(x, x, x)[0], base(x, x, x)[0], rtol=0, atol=0)
    module.enable()
    torch.testing.assert_close(module.eval()(x, x, x)[0], y, rtol=0, atol=0)


def test_merged_state_of_slices():
    """q, k and v apart share one bias: a merged module still saves every row of it unmerged."""
    module = build(lora_bias=True, kdim=6, vdim=10).eval()
    state = {key: value.clone() for key, value in module.state_dict().items()}
    module.merge(keep_backup=True)
    assert all(torch.equal(value, state[key]) for key, value in module.state_dict().items())
    assert not torch.equal(module.in_proj_bias, state["in_proj_bias"])


def test_from_sizes():
    module = LoRAMultiheadAttention(E, HEADS, 2, dropout=0.25, bias=False, batch_first=True, lora_dropout=0.5)
    assert module.dropout == 0.25 and module.in_proj_bias is None and module.in_proj.dropout_probability == 0.5
    assert (
        module.in_proj.layout == "in_out" and module.in_proj.lora_A.shape == (E, 2) and module.in_proj.scaling == 0.01
    )
    x = torch.randn(N, L, E)
    assert module(x, x, x)[0].shape == x.shape


@pytest.mark.parametrize("need_weights", [True, False])
def test_dtypes_autocast_and_compile(need_weights):
    module = build(torch.float32)
    x = torch.randn(N, L, E)
    y = module(x, x, x, need_weights=need_weights)[0]
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, x, x, need_weights=need_weights)[0], y)
    pad = torch.zeros(N, L, dtype=torch.bool)
    pad[0, 2:] = True
    call, truth = {"key_padding_mask": pad, "need_weights": need_weights}, module.to_attention().train()
    gold = truth(x, x, x, **call)[0]
    with torch.autocast("cpu", torch.bfloat16):
        cast, peer = module(x, x, x, **call)[0], truth(x, x, x, **call)[0]
    h = x.bfloat16()
    half = copy.deepcopy(module).bfloat16()(h, h, h, **call)[0]
    assert cast.dtype == half.dtype == torch.bfloat16
    assert_within_budget(cast, peer, gold, torch.bfloat16)
    assert_within_budget(half, truth.bfloat16()(h, h, h, **call)[0], gold, torch.bfloat16)


def test_checkpointing_repeats_the_dropout():
    module = build(torch.float32, dropout=0.5)
    x = torch.randn(N, L, E, requires_grad=True)
    found = []
    for run in (
        lambda: module(x, x, x)[0],
        lambda: torch.utils.checkpoint.checkpoint(lambda v: module(v, v, v)[0], x, use_reentrant=False),
    ):
        torch.manual_seed(3)
        y = run()
        module.zero_grad()
        y.square().sum().backward()
        found.append((y.detach(), module.in_proj.lora_B.grad.clone(), module.out_proj.lora_A.grad.clone()))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
    assert not torch.equal(found[0][0], module(x, x, x)[0])


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"targets": ("q_proj",)}, ValueError, "targets must be one of in_proj, out_proj"),
        ({"targets": ()}, ValueError, "targets must be some of in_proj, out_proj"),
        ({"rank": 0}, ValueError, "rank must be at least 1"),
        ({"lora_alpha": 3}, TypeError, "did you mean alpha"),
        ({"init": "pissa", "rank": 9}, ValueError, "rank must be at most"),
    ],
)
def test_bad_options(options, error, text):
    base = nn.MultiheadAttention(E, HEADS)
    with pytest.raises(error, match=text):
        LoRAMultiheadAttention.from_attention(base, **options)
    assert base.in_proj_weight.requires_grad and type(base.out_proj) is not LoRALinear


def test_bad_input():
    with pytest.raises(TypeError, match=r"original_layer must be an nn\.MultiheadAttention"):
        LoRAMultiheadAttention.from_attention(nn.Linear(E, E))
    module = build(torch.float32)
    with pytest.raises(TypeError, match="original_layer"):
        LoRAMultiheadAttention.from_attention(module)
    x = torch.randn(N, L, E)
    with pytest.raises(ValueError, match="attn_mask must be given with is_causal"):
        module(x, x, x, is_causal=True)
    with pytest.raises(ValueError, match="attn_mask must have shape"):
        module(x, x, x, attn_mask=torch.zeros(L, S))
    with pytest.raises(ValueError, match="key must fit query and value"):
        module(x[:1], x, x)
