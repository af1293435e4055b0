"""``accelerate`` gives the linear LoRA layers of a PEFT model our operators, in place; ``restore`` takes them out.

Only the class of a layer changes, to one built from the layer's own (`peft_layers`, `peft_bnb`): parameters, buffers,
keys, attributes, saved files, ``isinstance`` and every method stay PEFT's. fastpeft imports neither PEFT nor
bitsandbytes: a model that holds their layers has.
"""

from __future__ import annotations

import sys

from torch.nn import Module

from fastpeft.integrations import peft_layers as layers
from fastpeft.integrations.peft_report import Report, is_peft_layer, peft_module, reason, unfit

__all__ = ["Report", "accelerate", "reason", "restore"]


def _check(op: str, model: object) -> None:
    if not isinstance(model, Module):
        raise TypeError(f"{op}: model must be a torch.nn.Module, got {type(model).__name__}")


def accelerate(model: Module) -> Report:
    """Compute every PEFT ``lora.Linear`` under ``model`` that can be with `fastpeft.ops.lora_linear`.

    And every ``lora.Linear4bit``, over a weight of bitsandbytes, with `fastpeft.ops.linear4bit_lora`.

    model      any module: a PeftModel, a model with injected adapters, a single layer. Call it before ``fully_shard``,
               and again after adding adapters to further layers: a second call changes only what is new
    Returns    a `Report`: what is accelerated, what is left to PEFT's own forward, and why; print it
    Raises     TypeError: not a module.  After any error every layer has the class that it had.
    """
    _check("accelerate", model)
    report = Report()
    if peft_module("peft.tuners.lora.layer") is None:
        report.note = "no PEFT layers (peft is not imported)"
        return report
    conv1d = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    if conv1d is not None:
        layers.TRANSPOSED[conv1d] = True
    before: list[tuple[Module, type]] = []
    try:
        for name, module in model.named_modules():
            if not is_peft_layer(module):
                continue
            why = unfit(module)
            if why is not None:
                report.skipped[name] = why
                continue
            if not isinstance(module, layers.Accelerated):
                before.append((module, type(module)))
                module.__class__ = layers.accelerated(type(module))
            why = reason(module)
            if why is None:
                report.accelerated.append(name)
            else:
                report.skipped[name] = why
                report.waiting.append(name)
    except BaseException:
        for module, kind in before:
            module.__class__ = kind
        raise
    report.changed = len(before)
    report.note = "no PEFT layers"
    return report


def restore(model: Module) -> int:
    """Give every accelerated layer under ``model`` the class that it had; nothing else had changed.

    Returns    how many layers were changed back; 0 for a model that was not accelerated
    Raises     TypeError: not a module
    """
    _check("restore", model)
    changed = [module for module in model.modules() if isinstance(module, layers.Accelerated)]
    for module in changed:
        module.__class__ = layers.source(type(module))
    return len(changed)
