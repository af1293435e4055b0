"""``accelerate`` and ``restore`` change the class of each layer that a kind knows, and change it back."""

from __future__ import annotations

import sys
import warnings
from typing import Any

from torch.nn import Module

from fastpeft.integrations.peft import calls, gathered, inplace, unpacked
from fastpeft.integrations.peft import kind as classes
from fastpeft.integrations.peft.containers import models_in
from fastpeft.integrations.peft.factors import SHARDED
from fastpeft.integrations.peft.hf_hooks import become
from fastpeft.integrations.peft.kinds import kind_of, register
from fastpeft.integrations.peft.report import Report, reason, unfit

__all__ = ["accelerate", "restore"]


def accelerate(model: Any) -> Report:
    """Run every PEFT ``lora.Linear`` under ``model`` on `fastpeft.ops.lora_linear`, if the layer allows it.

    Run every ``lora.Linear4bit``, over a bitsandbytes weight, on `fastpeft.ops.linear4bit_lora`. If the model trains,
    its 4-bit bitsandbytes layers are kept from being repacked in eval mode (`unpacked`).

    model      any module: a PeftModel, a model with injected adapters, a single layer; or a pipeline or a trainer,
               whose models are taken. Call it again after adding adapters to further layers: a second call changes only
               what is new
    Returns    a `Report`: what is accelerated, what is left to PEFT's own forward, and why; print it. `status` says
               later what has happened
    Warns      if no layer is accelerated, or none is new; and later, once, about each reason missing from the report
               for which a layer leaves a call to PEFT
    Raises     TypeError: neither a module nor something that holds models.  After any error every layer has its
               previous class.
    """
    report = accelerated("accelerate", model)
    if not report.accelerated:
        warnings.warn(str(report), stacklevel=2)
    elif not report.changed:
        warnings.warn(f"{report}\n  nothing new: the layers have been accelerated before", stacklevel=2)
    return report


def accelerated(op: str, model: Any, told: bool = True) -> Report:
    """`accelerate` without its warnings, for callers that may come early or late; ``op`` names the caller in errors.

    told       whether a user sees the report; if not, its reasons are warned about like any others
    """
    models = models_in(op, model)
    report = Report()
    if sys.modules.get("peft.tuners.lora.layer") is None:
        report.note = "no PEFT layers (peft is not imported)"
    else:
        register()
        before: list[tuple[Module, type]] = []
        try:
            for prefix, part in models:
                _accelerate(part, prefix, report, before, told)
        except BaseException:
            for module, own in before:
                become(module, own)
            raise
        report.changed = sum(isinstance(module, classes.Accelerated) for module, _ in before)
        report.note = "no PEFT layers"
    return report


def _accelerate(model: Module, prefix: str, report: Report, before: list[tuple[Module, type]], told: bool) -> None:
    """Change the classes in one model; each previous class is appended to ``before`` as soon as it is changed."""
    below: set[Module] | None = None
    ours: dict[str, Any] = {}
    for name, module in model.named_modules():
        if not classes.is_peft_layer(module):
            continue
        name = prefix + name
        why = unfit(module)
        if why is not None:
            report.skipped[name] = why
            continue
        if not isinstance(module, classes.Accelerated):
            found = kind_of(module)
            assert found is not None
            before.append((module, type(module)))
            become(module, inplace.built(found.mixin, type(module)))
        ours[name] = module
        why = reason(module)
        if why == SHARDED:
            below = gathered.below_units(model) if below is None else below
            why = None if module in below and gathered.become_plain(module) else why
        if why is None:
            report.accelerated.append(name)
        else:
            report.skipped[name] = why
            report.waiting.append(name)
    bases = [module.base_layer for module in model.modules() if isinstance(module, classes.Accelerated)]
    for name, module in unpacked.keepable(model, bases).items():
        before.append((module, type(module)))
        become(module, unpacked.kept(module))
        if module.weight.device.type == "cpu":
            (report.repacked if unpacked.repacked(module) else report.unpacked).append(prefix + name)
    known = set(report.skipped.values()) if told else set()
    for name, module in ours.items():
        calls.open_record(module, name, known)


def restore(model: Any) -> int:
    """Give every layer under ``model`` the class that it had before `accelerate`; nothing else had changed.

    From then on a kept reference to our forward runs PEFT's.

    Returns    how many PEFT layers were changed back; 0 for a model that was not accelerated
    Raises     TypeError: neither a module nor something that holds models
    """
    parts = models_in("restore", model)
    changed = [module for _, part in parts for module in part.modules() if isinstance(module, inplace.InPlace)]
    layers = [module for module in changed if isinstance(module, classes.Accelerated)]
    for module in changed:
        become(module, inplace.source(type(module)))
    for module in layers:
        calls.forget(module)
    return len(layers)
