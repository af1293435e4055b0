"""The cost model against the measured H100 rows, and that it behaves like a time."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the Triton backend is not installed")

from fastpeft.kernels import _common, _cost
from fastpeft.kernels._gpu import Gpu, table_keys
from gpu import model

ROOT = Path(__file__).resolve().parents[2]
PASSES = ("shrink", "expand", "expand_add", "grad_b", "grad_a", "grad_a_dx")
SHAPES = [(8192, 4096, 4096), (8192, 14336, 4096), (8192, 4096, 14336), (1, 4096, 4096), (512, 1024, 768)]


@pytest.mark.parametrize("label", list(model.deviations()))
def test_measured_rows(label):
    assert abs(model.deviations()[label]) <= model.LIMIT


def test_rows_that_no_kernel_of_ours_ran_are_held_to_nothing():
    """torch.mm in place of an expand, and the best of a GEMM's noisy draws."""
    loose = {label for label, *_, held in model.rows() if not held}
    assert len(loose) == len(model.BY_TORCH) + len(model.PRODUCTS)
    assert all("torch.mm" in label or "best draw" in label for label in loose)


def test_main_succeeds(capsys):
    assert model.main([]) == 0
    assert "deviation" in capsys.readouterr().out


def test_the_printed_table_is_the_model_s():
    """docs/measured.md has what `make model` prints."""
    assert "\n".join(model.predictions()).strip() in (ROOT / "docs" / "measured.md").read_text()


@pytest.mark.parametrize("name", ["h100", "h200"])
@pytest.mark.parametrize("shape", model.SHAPES)
def test_no_prediction_beats_its_floor(name, shape):
    arch = _cost.ARCHES[name]
    for strategy in _cost.STRATEGIES:
        said = _cost.predict(model.M, *shape, 16, 0.0, arch=arch, strategy=strategy)
        assert said["ratio"] > model.floor_ratio(model.M, shape, 16, strategy, arch) > 1


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


@pytest.mark.parametrize("cc", [90, (9, 0), Gpu(90, "NVIDIA H200")])
def test_fused_where_the_gain_beats_the_margin(fresh_choices, monkeypatch, cc):
    """A fused GEMM as fast as the vendor's would win either pass of 4096 -> 14336; the measured one does not."""
    big = (8192, 14336, 4096, 16, 0.0, "bf16", cc)
    assert {_cost.choose_strategy(side, *big) for side in _cost.SIDES} == {"accumulate"}
    for name in ("h100", "h200"):
        monkeypatch.setitem(_cost.ARCHES, name, replace(_cost.ARCHES[name], fused_over_vendor=0.95))
    _cost.choose_strategy.cache_clear()
    assert {_cost.choose_strategy(side, *big) for side in _cost.SIDES} == {"fused"}


def test_choice():
    big = (8192, 14336, 4096, 16, 0.0)
    big = ("forward", *big)
    assert _cost.choose_strategy(*big, "fp32", 90) == "accumulate"
    for cc in (70, 80, 86, 89):  # no TMA
        assert _cost.choose_strategy(*big, "bf16", cc) == "accumulate"
    assert _cost.choose_strategy(*big, "bf16", 100) == "accumulate"  # nothing measured there
    assert _cost.choose_strategy("backward", 0, 4096, 4096, 16, 0.0, "bf16", 90) == "accumulate"


def test_a_device_is_known_by_its_name(monkeypatch):
    """Then by its memory, where a compute capability is more than one product; a measured rate goes first."""
    assert _cost.arch_of(90) is _cost.H100 is _cost.arch_of((9, 0))
    assert _cost.arch_of(Gpu(90, "NVIDIA H200")).name == "H200"
    assert _cost.arch_of(Gpu(80, "NVIDIA A100-SXM4-80GB")).name == "A100 80GB SXM"
    assert _cost.arch_of(Gpu(86, "NVIDIA A10")).name == "A10"
    pcie = Gpu(90, "NVIDIA H100 PCIe", 2.04e12)
    assert _cost.arch_of(pcie).name == "H100 80GB HBM3"
    assert _cost.arch_of(pcie).copy_bw == pytest.approx(2.04e12 * _cost.SHARE)
    assert _cost.arch_of(Gpu(90, "NVIDIA GH200 480GB", 4.0e12)).copy_bw == pytest.approx(4.0e12 * _cost.SHARE)
    monkeypatch.setitem(_cost.COPY_RATE, "NVIDIA H200", 4.1e12)
    assert _cost.arch_of(Gpu(90, "NVIDIA H200", 4.9e12)).copy_bw == 4.1e12
    assert _cost.arch_of(90).copy_bw == 3.0e12


def test_gpus_of_one_capability_are_not_the_same():
    named, other = Gpu(90, "NVIDIA H200"), Gpu(90, "NVIDIA H100 80GB HBM3")
    assert Gpu(90) == 90 and named != 90 and named != other and named == Gpu(90, "NVIDIA H200", 1.0)
    assert hash(named) == hash(90) and len({90, Gpu(90), named, other}) == 3
    assert f"sm{named}" == "sm90" and 90 <= named < 120
    assert table_keys(named) == ("NVIDIA H200", "sm90") and table_keys((9, 0)) == ("sm90",)


def test_table_comes_first(fresh_choices, monkeypatch):
    """For the pass that it names."""
    shape = (8192, 14336, 4096, 16, 0.0, "bf16", 90)
    monkeypatch.setitem(_cost.TABLE, _cost.strategy_key("backward", *shape), "fused")
    assert _cost.choose_strategy("backward", *shape) == "fused"
    assert _cost.choose_strategy("forward", *shape) == "accumulate"
    _cost.choose_strategy.cache_clear()
    h200, h100 = (("backward", *shape[:-1], Gpu(90, f"NVIDIA {name}")) for name in ("H200", "H100"))
    monkeypatch.setitem(_cost.TABLE, _cost.strategy_key(*h200), "accumulate")
    assert _cost.choose_strategy(*h200) == "accumulate"  # its own entry
    assert _cost.choose_strategy(*h100) == "fused"  # that of its compute capability


def test_tiles_of_a_device_come_first():
    tiles = {(80, "half", "plain", 16): 1, (90, "half", "plain", 16): 2, ("NVIDIA H200", "half", "plain", 16): 3}
    for arch, tile in ((Gpu(90, "NVIDIA H200"), 3), (Gpu(90, "NVIDIA H100"), 2), (90, 2), (89, 1), (120, 1)):
        assert _common.lookup_tile(tiles, arch, torch.bfloat16, 8) == tile


def test_size_buckets():
    """A batch length is asked for as the power of two that is nearest by ratio; none stays none."""
    assert [_cost.size_bucket(M) for M in (0, 1, 2, 3, 5, 6, 90, 91, 8192, 8191, 11585, 11586)] == [
        0, 1, 2, 4, 4, 8, 64, 128, 8192, 8192, 8192, 16384,
    ]  # fmt: skip


def test_bad_input():
    with pytest.raises(ValueError, match="strategy must be one of"):
        _cost.predict(8, 8, 8, 8, strategy="merge")
    with pytest.raises(ValueError, match="arch must be one of"):
        _cost.predict(8, 8, 8, 8, arch="v100")
    with pytest.raises(TypeError, match="dtype must be"):
        _cost.dtype_name("int8")
