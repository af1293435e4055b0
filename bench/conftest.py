"""The one timing fixture of the benchmarks, their options, and the results file they share.

    python -m pytest bench/bench_lora_linear.py -o addopts= --benchmark-only -q

pytest-benchmark's own table shows a *round*: every peer once, in turn. Peer by peer medians, spreads and ratios are in
extra_info, in bench/results/<op>_<device>.json and in the table printed at the end.
"""

import pytest
import torch

from common import tree
from common.report import result_tables
from common.timing import Race, steady_cpu


def pytest_addoption(parser):
    group = parser.getgroup("fastpeft benchmarks")
    group.addoption("--bench-device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    group.addoption("--bench-seconds", type=float, default=None, help="time budget of one case (default 20, CUDA 6)")
    group.addoption("--bench-tiny", action="store_true", help="tiny shapes, few rounds: tries the benchmark itself")


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        config = metafunc.config
        cases = metafunc.module.cases(config.getoption("--bench-device"), config.getoption("--bench-tiny"))
        metafunc.parametrize("case", cases, ids=lambda c: c.name.replace(" ", "-"))


@pytest.fixture(scope="session")
def device(request) -> str:
    device = request.config.getoption("--bench-device")
    if device == "cpu":
        steady_cpu()
    return device


@pytest.fixture(scope="session")
def tiny(request) -> bool:
    return request.config.getoption("--bench-tiny")


_COLLECTED: dict[str, dict] = {}


@pytest.fixture(scope="module")
def results(request, device, tiny):
    """What the module's tests add to; written to bench/results/ when the module ends, even if a test failed."""
    name = f"{request.module.OP}_{device}" + ("_tiny" if tiny else "")
    data = request.module.new_results(device, tiny)
    yield data
    _COLLECTED[name] = data
    tree.save_json(name, data)
    request.module.plot(data, tree.RESULTS / f"{name}.png")


@pytest.fixture
def race(benchmark, device, request):
    """race(peers, calls=1, budget_s=None, clock=None) -> Race that has run: warm-up, then rounds in the time budget.

    clock: "cuda" for device events, "cpu" for perf_counter; the benchmark's device unless said.
    """

    def run(peers: dict, calls: int = 1, budget_s: float | None = None, clock: str | None = None) -> Race:
        budget_s = request.config.getoption("--bench-seconds") or budget_s or (6.0 if device == "cuda" else 20.0)
        started = Race(peers, clock or device, calls)
        rounds = started.warm_up(budget_s)
        benchmark.pedantic(started.round, rounds=rounds, iterations=1, warmup_rounds=0)
        benchmark.extra_info["calls"] = calls
        benchmark.extra_info["seconds_by_peer"] = {name: sorted(s)[len(s) // 2] for name, s in started.samples.items()}
        return started

    return run


def pytest_terminal_summary(terminalreporter):
    for name, data in _COLLECTED.items():
        terminalreporter.section(name)
        terminalreporter.write_line(result_tables(data))
