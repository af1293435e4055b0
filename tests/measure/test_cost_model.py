"""The cost model against the measured H100 rows, and that it behaves like a time."""

import pytest

from fastpeft.kernels import _cost
from gpu import model

PASSES = ("shrink", "expand", "expand_add", "grad_b", "grad_a", "grad_a_dx")
SHAPES = [(8192, 4096, 4096), (8192, 14336, 4096), (8192, 4096, 14336), (1, 4096, 4096), (512, 1024, 768)]


@pytest.mark.parametrize("label", list(model.deviations()))
def test_measured_rows(label):
    deviation = model.deviations()[label]
    if label in model.UNMET:
        assert abs(deviation) > model.LIMIT, f"{label} is met now: take it out of UNMET"
        return
    assert abs(deviation) <= model.LIMIT


def test_unmet_rows_are_few_and_real():
    assert set(model.UNMET) <= set(model.deviations())
    assert len(model.UNMET) <= 1


def test_main_succeeds(capsys):
    assert model.main() == 0
    assert "deviation" in capsys.readouterr().out


@pytest.mark.parametrize("name", PASSES)
def test_pass_time_grows(name):
    """More rows, columns, rank or dropout never take less time, and fp32 moves more than bf16."""
    base = _cost.pass_time(name, 4096, 4096, 4096, 16, 0.0, "bf16")
    assert base > 0
    for bigger in (
        _cost.pass_time(name, 8192, 4096, 4096, 16, 0.0, "bf16"),
        _cost.pass_time(name, 4096, 8192, 8192, 16, 0.0, "bf16"),
        _cost.pass_time(name, 4096, 4096, 4096, 256, 0.0, "bf16"),
        _cost.pass_time(name, 4096, 4096, 4096, 16, 0.0, "fp32"),
    ):
        assert bigger > base
    assert _cost.pass_time(name, 4096, 4096, 4096, 16, 0.1, "bf16") >= base


def test_gemm_time_grows_without_steps():
    """Doubling any side never shortens it, and the boost limit joins without a jump."""
    for arch in _cost.ARCHES.values():
        times = [_cost.gemm_time(m, 4096, 4096, "bf16", arch) for m in (1, 16, 256, 1024, 4096, 8192, 8193, 65536)]
        assert times == sorted(times)
        assert times[6] / times[5] < 1.01


@pytest.mark.parametrize("M, N, K", SHAPES)
@pytest.mark.parametrize("strategy", _cost.STRATEGIES)
def test_predict_adds_up(M, N, K, strategy):
    parts = _cost.predict(M, N, K, 16, 0.1, "bf16", "h100", strategy)
    assert parts["total"] == pytest.approx(parts["fwd"] + parts["bwd"])
    for side in ("fwd", "bwd"):
        assert parts[side] == pytest.approx(sum(v for k, v in parts.items() if k.startswith(side + "_")))
    assert parts["ratio"] > 1  # two more passes on each side are never free


def test_no_pass_beats_its_floor():
    """No predicted pass runs faster than its bytes at the data sheet's bandwidth."""
    for name in PASSES:
        floor = _cost.pass_bytes(name, 8192, 4096, 4096, 16, 2) / 3.35e12
        assert _cost.pass_time(name, 8192, 4096, 4096, 16, 0.0, "bf16") > floor


@pytest.fixture
def fresh_choices():
    _cost.choose_strategy.cache_clear()
    yield
    _cost.choose_strategy.cache_clear()


@pytest.mark.parametrize("cc", [90, (9, 0)])
def test_fused_where_the_gain_beats_the_margin(fresh_choices, monkeypatch, cc):
    """At 4096 -> 14336 fused is predicted 3 % ahead: within the spread of a GEMM, so the default stays accumulate."""
    big = (8192, 14336, 4096, 16, 0.0, "bf16", cc)
    assert _cost.choose_strategy(*big) == "accumulate"
    monkeypatch.setattr(_cost, "FUSED_MARGIN", 0.01)
    _cost.choose_strategy.cache_clear()
    assert _cost.choose_strategy(*big) == "fused"


def test_choice():
    big = (8192, 14336, 4096, 16, 0.0)
    assert _cost.choose_strategy(*big, "fp32", 90) == "accumulate"
    for cc in (70, 80, 86, 89):  # no TMA
        assert _cost.choose_strategy(*big, "bf16", cc) == "accumulate"
    assert _cost.choose_strategy(*big, "bf16", 100) == "accumulate"  # nothing measured there
    assert _cost.choose_strategy(0, 4096, 4096, 16, 0.0, "bf16", 90) == "accumulate"


def test_table_comes_first(fresh_choices, monkeypatch):
    shape = (8192, 14336, 4096, 16, 0.0, "bf16", 90)
    monkeypatch.setitem(_cost.TABLE, _cost.strategy_key(*shape), "fused")
    assert _cost.choose_strategy(*shape) == "fused"


def test_bad_input():
    with pytest.raises(ValueError, match="strategy must be one of"):
        _cost.predict(8, 8, 8, 8, strategy="merge")
    with pytest.raises(ValueError, match="arch must be one of"):
        _cost.predict(8, 8, 8, 8, arch="v100")
    with pytest.raises(TypeError, match="dtype must be"):
        _cost.dtype_name("int8")
