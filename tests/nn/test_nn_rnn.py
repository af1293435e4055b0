"""LoRA on recurrent cells and layers: torch's own with merged weights is the truth, dropout against its formula."""

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils.checkpoint import checkpoint

from fastpeft import (
    LoRAGRU,
    LoRAGRUCell,
    LoRALSTM,
    LoRALSTMCell,
    LoRARNN,
    LoRARNNCell,
    disable_lora,
    enable_lora,
    lora_disabled,
)
from fastpeft.ops import lora_adapter
from fastpeft.testing import assert_within_budget

BENCH = Path(__file__).resolve().parents[2] / "bench" / "bench_lora_lstm.py"
CELLS = {LoRARNNCell: nn.RNNCell, LoRALSTMCell: nn.LSTMCell, LoRAGRUCell: nn.GRUCell}
LAYERS = {LoRARNN: nn.RNN, LoRALSTM: nn.LSTM, LoRAGRU: nn.GRU}
CASES = {
    "tanh": (LoRARNN, {}),
    "relu": (LoRARNN, {"nonlinearity": "relu", "bidirectional": True, "bias": False}),
    "lstm": (LoRALSTM, {"num_layers": 2}),
    "proj": (LoRALSTM, {"num_layers": 2, "bidirectional": True, "proj_size": 3}),
    "no bias": (LoRALSTM, {"bias": False, "batch_first": True}),
    "gru": (LoRAGRU, {"num_layers": 2, "bidirectional": True, "batch_first": True}),
}
I, H, T, N = 5, 6, 4, 3


def adapted(kind, dtype=torch.float64, dropout=0.0, lora_bias=False, base=None, **options):
    torch.manual_seed(0)
    base = base or (CELLS | LAYERS)[kind](I, H, dtype=dtype, **options)
    make = kind.from_cell if kind in CELLS else kind.from_rnn
    module = make(base, rank=2, alpha=1.0, dropout=dropout, lora_bias=lora_bias)
    for name, parameter in module.named_parameters():
        if "lora_B" in name or "lora_bias" in name:
            nn.init.normal_(parameter, 0, 0.5)
    return module


def flat(value):
    if isinstance(value, torch.Tensor):
        return [value]
    return [value.data] if isinstance(value, PackedSequence) else [t for part in value for t in flat(part)]


def close(ours, gold, **tolerance):
    for a, b in zip(flat(ours), flat(gold), strict=True):
        torch.testing.assert_close(a, b, **tolerance)


def plain(module):
    """Torch's module with the merged weights as leaves, and a function that gives dA and dB from their gradients."""
    truth = (module.to_cell() if type(module) in CELLS else module.to_rnn()).train(module.training).requires_grad_()

    def factors():
        found = {}
        for name, part in module.parts().items():
            dw = truth.get_parameter(part.site.weight).grad
            found[f"{name}.lora_A"] = part.scaling * part.lora_B.t() @ dw
            found[f"{name}.lora_B"] = part.scaling * dw @ part.lora_A.t()
            if part.lora_bias is not None:
                found[f"{name}.lora_bias"] = part.scaling * truth.get_parameter(part.site.bias).grad
        return found

    return truth, factors


def gradients(module, truth, factors, *args):
    """Equal outputs, and equal gradients of x, the states and the factors."""
    leaves = [t for t in flat(args) if t.requires_grad]
    ours, gold = module(*args), truth(*args)
    close(ours, gold)
    dys = [torch.randn_like(t) for t in flat(gold)]
    mine = torch.autograd.grad(flat(ours), [*leaves, *(p for p in module.parameters() if p.requires_grad)], dys)
    theirs = torch.autograd.grad(flat(gold), leaves, dys, retain_graph=True)
    close(mine[: len(leaves)], theirs)
    torch.autograd.backward(flat(gold), dys)
    names = [name for name, p in module.named_parameters() if p.requires_grad]
    expected = factors()
    for name, value in zip(names, mine[len(leaves) :], strict=True):
        # lora_linear adds the gradients of a bias up in fp32.
        tolerance = {"rtol": 1e-5, "atol": 1e-6} if "bias" in name else {}
        torch.testing.assert_close(value, expected[name], msg=name, **tolerance)


@pytest.mark.parametrize("shape", [(N,), ()], ids=["batch", "unbatched"])
@pytest.mark.parametrize("kind", CELLS)
def test_cell_is_torchs_with_merged_weights(kind, shape):
    module = adapted(kind, lora_bias=True)
    truth, factors = plain(module)
    x, *states = (torch.randn(*shape, size, dtype=torch.float64, requires_grad=True) for size in (I, H, H))
    hx = tuple(states) if kind is LoRALSTMCell else states[0]
    gradients(module, truth, factors, x, hx)
    close(module(x), truth(x))
    if shape:
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        close(compiled(x, hx), module(x, hx))


def test_relu_cell_without_bias():
    module = adapted(LoRARNNCell, nonlinearity="relu", bias=False)
    x, h = (torch.randn(N, size, dtype=torch.float64, requires_grad=True) for size in (I, H))
    gradients(module, *plain(module), x, h)
    # SPEC decision 36: the document's cell took tanh twice and stayed within tanh(1).
    assert module(3 * x, 3 * h).max() > 1.0


@pytest.mark.parametrize("kind", CELLS)
def test_cell_dropout_is_on_what_a_reads(kind):
    module, x = adapted(kind, torch.float32, dropout=0.5), torch.randn(64, I)
    torch.manual_seed(1)
    y = flat(module(x))[0]
    torch.manual_seed(1)
    again = flat(checkpoint(module, x, use_reentrant=False))[0]
    assert torch.equal(y, again) and not torch.equal(y, flat(module(x))[0])
    assert torch.equal(flat(module.eval()(x))[0], flat(module(x))[0])


@pytest.mark.parametrize("form", ["padded", "packed", "unbatched"])
@pytest.mark.parametrize("case", CASES)
def test_sequence_is_torchs_with_merged_weights(case, form):
    kind, options = CASES[case]
    module = adapted(kind, lora_bias=options.get("bias", True), **options)
    first, double = module.batch_first, {"dtype": torch.float64, "requires_grad": True}
    rows = module.num_layers * (1 + module.bidirectional)
    states = [torch.randn(rows, N, size, **double) for size in (module.hidden_size, module.hidden_size)]
    if getattr(module, "proj_size", 0):
        states[0] = torch.randn(rows, N, module.proj_size, **double)
    x = torch.randn((N, T, I) if first else (T, N, I), **double)
    given = x
    if form == "packed":
        given = pack_padded_sequence(x, torch.tensor([2, 4, 3]), first, enforce_sorted=False)
    if form == "unbatched":
        given = x = torch.randn(T, I, **double)
        states = [h[:, 0].detach().requires_grad_() for h in states]
    hx = tuple(states) if kind is LoRALSTM else states[0]
    truth, factors = plain(module)
    if form == "packed":
        close(module(given, hx), truth(given, hx))
    else:
        gradients(module, truth, factors, given, hx)
    close(module(given), truth(given))
    # What A reads is dropped with a probability that drops nothing: the other path, the same numbers.
    for part in module.parts().values():
        part.dropout_probability = 1e-12
    if form == "packed":
        close(module(given, hx), truth(given, hx))
    else:
        truth.zero_grad()
        gradients(module, truth, factors, given, hx)


@pytest.mark.parametrize("kind", [*CELLS, *LAYERS])
def test_wide_adapters_a_tensor_of_a_scale_and_writing_into_the_output(kind):
    module = adapted(kind, torch.bfloat16)
    part = next(iter(module.parts().values()))
    assert part.lora_A.dtype == torch.float32
    x = torch.randn(*(() if kind in CELLS else (T,)), N, I, dtype=torch.bfloat16)
    y = flat(module(x))[0]
    for part in module.parts().values():
        part.scaling = torch.tensor(part.scaling)
    again = flat(module(x))[0]
    torch.testing.assert_close(again, y)
    (again.mul_(2.0) if kind in LAYERS else again).sum().backward()
    assert y.dtype == torch.bfloat16 and part.lora_B.grad.dtype == torch.float32


@pytest.mark.parametrize("kind", LAYERS)
def test_a_base_that_is_trained_too(kind):
    base = LAYERS[kind](I, H, dtype=torch.float64)
    module = kind.from_rnn(base, rank=2, dropout=0.0, freeze_base=False)
    nn.init.normal_(module.lora_hh_l0.lora_B)
    truth = module.to_rnn()
    x = torch.randn(T, N, I, dtype=torch.float64)
    for layer in (module, truth):
        layer(x)[0].square().sum().backward()
    for name, parameter in truth.named_parameters():
        torch.testing.assert_close(module.get_parameter(name).grad, parameter.grad, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", LAYERS)
def test_sequence_compiles(kind):
    """Forward and gradients; of an LSTM too, which torch 2.13 cannot train compiled on a CPU."""
    module, x = adapted(kind, torch.float32), torch.randn(2, N, I)
    with torch._dynamo.config.patch(allow_rnn=True):
        y = torch.compile(module, fullgraph=True, backend="aot_eager")(x)
    leaves = [p for p in module.parameters() if p.requires_grad]
    gold = module(x)
    close(y, gold)
    close(torch.autograd.grad(y[0].sum(), leaves), torch.autograd.grad(gold[0].sum(), leaves))


@pytest.mark.parametrize("bidirectional", [False, True])
def test_sequence_dropout_against_its_formula(bidirectional):
    """drop(x) has one mask for each direction and layer, and A alone reads it."""
    module = adapted(LoRALSTM, torch.float32, dropout=0.5, bidirectional=bidirectional)
    x = torch.randn(T, N, I)
    torch.manual_seed(4)
    y = module(x)[0]
    torch.manual_seed(4)
    one, eye = torch.ones_like(x), torch.eye(I)
    masks = [lora_adapter(one, eye, eye, dropout=0.5) for _ in range(1 + bidirectional)]
    assert set(masks[0].unique().tolist()) == {0.0, 2.0}
    assert not bidirectional or not torch.equal(*masks)
    for direction, mask in enumerate(masks):
        part = module.parts()["lora_ih_l0" + "_reverse" * direction]
        gates = x @ part.weight.t() + part.bias + part.scaling * (x * mask) @ part.lora_A.t() @ part.lora_B.t()
        hh = module.parts()["lora_hh_l0" + "_reverse" * direction]
        w_hh, b_hh = hh.effective(torch.float32)
        h = c = torch.zeros(N, H)
        found = []
        for step in gates.flip(0) if direction else gates:
            i, f, g, o = (step + h @ w_hh.t() + b_hh).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            found.append(h)
        found = torch.stack(found[::-1] if direction else found)
        torch.testing.assert_close(y[..., direction * H : (direction + 1) * H], found)
    torch.manual_seed(4)
    close(checkpoint(module, x, use_reentrant=False)[0], y)
    close(module.eval()(x), module(x), rtol=0, atol=0)


def test_dropout_between_layers_is_torchs():
    base = nn.GRU(I, H, 3, dropout=0.5)
    module, x = adapted(LoRAGRU, base=base), torch.randn(T, N, I)
    truth = module.to_rnn().train()
    torch.manual_seed(2)
    gold = truth(x)
    torch.manual_seed(2)
    close(module(x), gold)
    # Layer by layer, as lora_dropout asks for it: between layers too something is dropped, in training alone.
    module.lora_ih_l0.dropout_probability = 1e-12
    assert not torch.equal(module(x)[0], module(x)[0])
    close(module.eval()(x), truth.eval()(x))


@pytest.mark.parametrize("kind", [LoRALSTMCell, LoRARNN, LoRALSTM, LoRAGRU])
def test_half_precision_keeps_the_update(kind):
    """No further from fp32 than torch's merged module in bf16, and sequences run in fp32 but for the output."""
    module = adapted(kind, torch.float32)
    truth, _ = plain(module)
    x = torch.randn(N, I) if kind in CELLS else torch.randn(T, N, I)
    half = copy.deepcopy(module).bfloat16()
    h = x.bfloat16()
    gold, ours, peer = truth(x), half(h), copy.deepcopy(truth).bfloat16()(h)
    with torch.autocast("cpu", torch.bfloat16):
        cast, cast_peer = module(x), truth(x)
    for i, value in enumerate(flat(gold)):
        assert flat(ours)[i].dtype == torch.bfloat16
        assert_within_budget(flat(ours)[i], flat(peer)[i], value, torch.bfloat16)
        assert_within_budget(flat(cast)[i], flat(cast_peer)[i], value, torch.bfloat16)
    if kind in LAYERS:
        assert flat(cast)[0].dtype == torch.bfloat16
        assert torch.equal(ours[0], half.float()(h.float())[0].bfloat16())


@pytest.mark.parametrize("kind", [*CELLS, *LAYERS])
def test_identity_states_and_merge(kind):
    base = (CELLS | LAYERS)[kind](I, H)
    x = torch.randn(N, I) if kind in CELLS else torch.randn(T, N, I)
    before, keys = base(x), set(base.state_dict())
    fresh = (kind.from_cell if kind in CELLS else kind.from_rnn)(base).eval()
    close(fresh(x), before)
    assert all("lora_" in name for name, p in fresh.named_parameters() if p.requires_grad)
    part = fresh.lora_ih if kind in CELLS else fresh.lora_ih_l0
    assert part.rank == 16 and part.scaling == 2.0 and part.dropout_probability == 0.05
    assert isinstance(fresh, (CELLS | LAYERS)[kind])
    module = adapted(kind, torch.float32, lora_bias=True, base=base).eval()
    y = module(x)
    state = {key: value.clone() for key, value in module.state_dict().items()}
    assert keys < state.keys() and all("lora_" in key for key in state.keys() - keys)
    missing = module.load_state_dict((CELLS | LAYERS)[kind](I, H).state_dict(), strict=False)
    assert not missing.unexpected_keys and set(missing.missing_keys) == state.keys() - keys
    module.load_state_dict(state)
    for backup in (True, False):
        reports = module.merge(keep_backup=backup)
        assert set(reports) == set(module.parts()) and module.merged
        close(module(x), y)
        if backup:
            merged = module.state_dict()
            assert list(merged) == list(state) and all(torch.equal(merged[key], state[key]) for key in state)
            for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
                twin.unmerge()
                close(twin(x), y, rtol=0, atol=0)
            with lora_disabled(module):
                close(module(x), before, rtol=0, atol=0)
            assert module.merged
            module.load_state_dict(state)
            assert not module.merged
        else:
            with pytest.raises(ValueError, match="unmerged, or from a merge that kept its backup"):
                module.state_dict()
            module.train().eval()
            close(module(x), y)
            module.load_state_dict(state)
    assert disable_lora(module) == len(module.parts())
    close(module(x), before, rtol=0, atol=0)
    enable_lora(module)
    close(module.double()(x.double()), y, check_dtype=False)


def test_a_refused_merge_changes_nothing():
    module = adapted(LoRALSTM, torch.float32).eval()
    nn.init.constant_(module.lora_hh_l0.lora_B, float("inf"))
    state = {key: value.clone() for key, value in module.state_dict().items()}
    with pytest.raises(ValueError, match="stay finite"):
        module.merge()
    assert not module.merged and all(torch.equal(value, state[key]) for key, value in module.state_dict().items())
    biased = LoRAGRU(I, H, bias=False, lora_bias=True)
    with pytest.raises(ValueError, match="lora_bias must have a bias of the base"):
        biased.merge()


def test_from_sizes():
    cell = LoRARNNCell(I, H, 3, nonlinearity="relu", lora_dropout=0.25)
    assert cell.bias_ih is not None and cell.nonlinearity == "relu" and cell.lora_ih.lora_bias is None
    assert cell.lora_ih.lora_A.shape == (I, 3) and cell.lora_hh.lora_B.shape == (3, H)
    assert cell.lora_ih.scaling == 0.01 and cell.lora_hh.dropout_probability == 0.25
    assert LoRAGRUCell(I, H).lora_ih.rank == 4
    layer = LoRALSTM(I, H, rank=2, num_layers=2, bidirectional=True, dropout=0.5, bias=False, lora_bias=True)
    assert layer.dropout == 0.5 and layer.lora_ih_l0.dropout_probability == 0.0 and not layer.bias
    shapes = {name: tuple(p.shape) for name, p in layer.named_parameters() if p.requires_grad}
    assert shapes["lora_hh_l0_reverse.lora_B"] == (2, 4 * H) and shapes["lora_ih_l1.lora_A"] == (2 * H, 2)
    nn.init.ones_(layer.lora_ih_l0.lora_bias)
    x = torch.randn(T, N, I)
    with lora_disabled(layer):
        off = layer(x)[0]
    assert not torch.equal(layer(x)[0], off)


def parametrized():
    return nn.utils.parametrizations.weight_norm(nn.GRU(I, H), "weight_hh_l0")


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: LoRALSTM.from_rnn(nn.GRU(I, H)), TypeError, r"original_layer must be an nn\.LSTM"),
        (lambda: LoRAGRUCell.from_cell(nn.GRU(I, H)), TypeError, r"original_layer must be an nn\.GRUCell"),
        (lambda: LoRALSTM.from_rnn(LoRALSTM(I, H)), TypeError, "original_layer"),
        (lambda: LoRALSTM(I, H, lora_alpha=1), TypeError, "did you mean alpha"),
        (lambda: LoRALSTM(I), TypeError, "hidden_size must be an integer"),
        (lambda: LoRARNNCell(I, H, 0), ValueError, "rank must be at least 1"),
        (lambda: LoRARNNCell(I, H)(torch.randn(N, I + 1)), ValueError, r"input must have shape \[3, 5\]"),
        (lambda: LoRAGRUCell(I, H)(torch.randn(N, I), torch.randn(1, H)), ValueError, r"hx must have shape \[3, 6\]"),
        (lambda: LoRALSTM(I, H)(torch.randn(T, N, I), torch.randn(1, N, H)), TypeError, "hx must be a pair"),
        (lambda: LoRAGRU(I, H)(torch.randn(T, N, I), torch.randn(N, H)), ValueError, "hx must have 3 dimensions"),
        (lambda: LoRAGRU(I, H)(torch.randn(T, N, I), torch.randn(1, 1, H)), RuntimeError, "Expected hidden size"),
        (lambda: LoRAGRU(I, H)(torch.randn(T, N, I).double()), ValueError, "dtype"),
        (lambda: LoRAGRU(I, H)(torch.randn(0, N, I)), ValueError, "input must have at least one step"),
        (lambda: LoRAGRU.from_rnn(parametrized()), ValueError, "weight_hh_l0 must be a plain Parameter"),
    ],
)
def test_bad_input(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_benchmark_runs_on_tiny_shapes(tmp_path):
    command = [sys.executable, str(BENCH), "--tiny", "--seconds", "0.05"]
    done = subprocess.run(
        command, env=os.environ | {"FASTPEFT_BENCH_RESULTS": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    case = json.loads((tmp_path / "lora_lstm_cpu_tiny.json").read_text())["cases"][0]
    assert {"frozen", "ours p=0.0", "ours p=0.1"} < case["peers"].keys() and case["case"] in done.stdout
