"""pytest plugin (``-p peft_plugin``): accelerate every ``lora.Linear`` that PEFT's own tests make, and count the calls.

``--peft-plain`` leaves PEFT alone (the baseline); ``--peft-report FILE`` gets the failures and the share of each path.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import sys
import types
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

# PEFT's test helpers import one name of each, for tests that we do not run.
_STAND_INS = {"diffusers": "StableDiffusionPipeline", "datasets": "load_dataset"}

FAST = "fast: one operator"
failures: list[str] = []
calls: Counter[str] = Counter()
wrong: Counter[str] = Counter()
outcomes: Counter[str] = Counter()


def _stand_in(name: str, attribute: str) -> None:
    if importlib.util.find_spec(name) is None:
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        setattr(module, attribute, type(attribute, (), {}))
        sys.modules[name] = module


def _accelerate_what_peft_makes() -> None:
    from peft.tuners.lora import layer as peft_layer

    from fastpeft.integrations import accelerate
    from fastpeft.integrations.peft import linear, reason
    from fastpeft.integrations.peft.kind import Accelerated

    made = peft_layer.Linear.__init__
    operator = linear.lora_linear
    forward = Accelerated.forward

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        with warnings.catch_warnings():  # theirs look at every warning
            warnings.simplefilter("ignore")
            accelerate(self)

    def counting_operator(*args: Any, **kwargs: Any) -> Any:
        calls[FAST] += 1
        return operator(*args, **kwargs)

    def counting_forward(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        # Asked before the call: a disabled layer unmerges itself in it.
        why, before = reason(self, x, args, dict(kwargs)), calls[FAST]
        y = forward(self, x, *args, **kwargs)
        fast = calls[FAST] > before
        if not fast:
            calls[f"PEFT: {why}"] += 1
        if fast is (why is not None):
            wrong[f"reason says {why!r}, but the call was {'fast' if fast else 'left to PEFT'}"] += 1
        return y

    peft_layer.Linear.__init__ = init
    linear.lora_linear = counting_operator
    Accelerated.forward = counting_forward  # type: ignore[method-assign]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--peft-plain", action="store_true")
    parser.addoption("--peft-report", default=None)


def pytest_configure(config: pytest.Config) -> None:
    import torch

    torch.set_num_threads(1)
    import peft  # noqa: F401  before the stand-ins: it looks for the real packages

    for name, attribute in _STAND_INS.items():
        _stand_in(name, attribute)
    if not config.getoption("--peft-plain"):
        _accelerate_what_peft_makes()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or not report.passed:
        outcomes[report.outcome] += 1
    if report.failed:
        failures.append(report.nodeid)


def pytest_sessionfinish(session: pytest.Session) -> None:
    target = session.config.getoption("--peft-report")
    if target:
        found = {"failures": failures, "outcomes": outcomes, "calls": calls, "wrong": wrong}
        Path(target).write_text(json.dumps(found, indent=1))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    total = max(sum(calls.values()), 1)
    for path, count in calls.most_common():
        terminalreporter.write_line(f"{count:7d}  {100 * count / total:5.1f} %  {path}")
    for text, count in wrong.most_common():
        terminalreporter.write_line(f"{count:7d}  WRONG  {text}")
