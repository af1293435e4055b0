"""``accelerate`` and ``restore``: the class of each layer that a kind knows, changed and changed back."""

from __future__ import annotations

import sys

from torch.nn import Module

from fastpeft.integrations.peft import gathered, inplace, unpacked
from fastpeft.integrations.peft import kind as classes
from fastpeft.integrations.peft.factors import SHARDED
from fastpeft.integrations.peft.hf_hooks import become
from fastpeft.integrations.peft.kinds import KINDS, kind_of
from fastpeft.integrations.peft.report import Report, reason, unfit

__all__ = ["accelerate", "restore"]


def _check(op: str, model: object) -> None:
    if not isinstance(model, Module):
        raise TypeError(f"{op}: model must be a torch.nn.Module, got {type(model).__name__}")


def accelerate(model: Module) -> Report:
    """Compute every PEFT ``lora.Linear`` under ``model`` that can be with `fastpeft.ops.lora_linear`.

    And every ``lora.Linear4bit``, over a weight of bitsandbytes, with `fastpeft.ops.linear4bit_lora`. bitsandbytes' own
    4-bit layers of a model that trains are kept from being repacked in eval mode (`unpacked`).

    model      any module: a PeftModel, a model with injected adapters, a single layer. Call it
               again after adding adapters to further layers: a second call changes only what is new
    Returns    a `Report`: what is accelerated, what is left to PEFT's own forward, and why; print it
    Raises     TypeError: not a module.  After any error every layer has the class that it had.
    """
    _check("accelerate", model)
    report = Report()
    if sys.modules.get("peft.tuners.lora.layer") is None:
        report.note = "no PEFT layers (peft is not imported)"
        return report
    for kind in KINDS:
        kind.register()
    before: list[tuple[Module, type]] = []
    below: set[Module] | None = None
    try:
        for name, module in model.named_modules():
            if not classes.is_peft_layer(module):
                continue
            why = unfit(module)
            if why is not None:
                report.skipped[name] = why
                continue
            if not isinstance(module, classes.Accelerated):
                found = kind_of(module)
                assert found is not None
                before.append((module, type(module)))
                become(module, inplace.built(found.mixin, type(module)))
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
                (report.repacked if unpacked.repacked(module) else report.unpacked).append(name)
    except BaseException:
        for module, own in before:
            become(module, own)
        raise
    report.changed = sum(isinstance(module, classes.Accelerated) for module, _ in before)
    report.note = "no PEFT layers"
    return report


def restore(model: Module) -> int:
    """Give every layer under ``model`` the class that it had before `accelerate`; nothing else had changed.

    Returns    how many PEFT layers were changed back; 0 for a model that was not accelerated
    Raises     TypeError: not a module
    """
    _check("restore", model)
    changed = [module for module in model.modules() if isinstance(module, inplace.InPlace)]
    layers = sum(isinstance(module, classes.Accelerated) for module in changed)
    for module in changed:
        become(module, inplace.source(type(module)))
    return layers
