"""Putting a `Bundle` into a model: everything is checked against the model before the model changes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from fastpeft.files.bundle import PROMPTS, Bundle, Part
from fastpeft.manager import methods, prompts, targets
from fastpeft.manager.manager import EfficientFineTuningManager
from fastpeft.manager.outgoing import check_untied
from fastpeft.manager.placing import Entry
from fastpeft.nn.factors import Adaptive, LoRAModule
from fastpeft.nn.layers.lora_conv import _LoRAConv
from fastpeft.nn.prompts import PrefixTuning
from fastpeft.nn.prompts.insertion import prefix_sizes
from fastpeft.ops import _checks

# Options that only the file may set.
_SAID = {"rank", "alpha", "scaling", "use_rslora", "bias", "lora_bias", "init", "form", "max_rank", "min_rank"}


def put(
    op: str, manager: EfficientFineTuningManager, bundle: Bundle, name: str, method: str | None, options: dict[str, Any]
) -> None:
    """Load the adapter into the manager's adapter of that name, or add it as a new one.

    Raises     ValueError, TypeError: a module, shape, method or name that does not fit; nothing has been changed then.
    """
    said = sorted(_SAID & options.keys())
    _checks.require(not said, op, said[0] if said else "", "be left out: the file says it", "given")
    saved = _whole(op, manager, bundle)
    fresh = name not in manager.methods
    if not fresh:
        given = sorted(options) or method
        _checks.require(not given, op, "options", "be left out for an adapter that is there", given)
        entries = _fitting(op, manager, bundle, name)
    elif bundle.kind in PROMPTS:
        _checks.require(method is None, op, "method", f"be left out for {bundle.kind}", repr(method))
        entries = _insert(op, manager, bundle, name, options)
    else:
        entries = _place(op, manager, bundle, name, method, options, saved)
    try:
        for entry in entries:
            _check_range(op, entry.module, bundle, bundle.parts.get(entry.path))
    except ValueError:
        if fresh:
            manager.delete(name)
        raise
    for entry in entries:
        entry.forget_packed()
    manager._unmerge(entries)
    manager._save_whole(saved)
    with torch.no_grad():
        for entry in entries:
            _fill(entry.module, bundle, bundle.parts.get(entry.path))
        for path, module in saved.items():
            start = f"{path}."
            held = {key.removeprefix(start): value for key, value in bundle.whole.items() if key.startswith(start)}
            module.load_state_dict(held)


def _check_part(op: str, path: str, module: nn.Module | None, part: Part) -> None:
    """Check that the module is an adaptable layer, of these sizes."""
    _checks.require(module is not None, op, part.named("a"), "name a module of the model", repr(path))
    assert module is not None
    layer: Any = methods.bare(module)
    sizes = methods.sizes(module)
    conv = isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d, _LoRAConv))
    rule = "name a linear layer or a convolution"
    _checks.require(sizes is not None or conv, op, part.named("a"), rule, type(layer).__name__)
    rule = "name no layer of an nn.MultiheadAttention"
    _checks.require(not methods.is_read(layer), op, part.named("a"), rule, repr(path))
    if conv:
        want_a, out = (part.rank, *layer.weight.shape[1:]), layer.weight.shape[0]
    else:
        assert sizes is not None
        want_a, out = (part.rank, sizes[0]), sizes[1]
    text = ", ".join(("r", *map(str, want_a[1:])))
    fits = tuple(part.a.shape) == want_a
    _checks.require(fits, op, part.named("a"), f"have shape [{text}], by the model's layer", list(part.a.shape))
    rule = f"have {out} rows, by the model's layer"
    _checks.require(part.b.shape[0] == out, op, part.named("b"), rule, list(part.b.shape))


def _fitting(op: str, manager: EfficientFineTuningManager, bundle: Bundle, name: str) -> list[Entry]:
    """The entries of an existing adapter that these values fit."""
    entries = manager._of(name)
    if bundle.kind in PROMPTS:
        module: Any = entries[0].module
        shape = (getattr(module, "num_virtual_tokens", 0), getattr(module, "width", 0))
        assert bundle.table is not None
        same = (entries[0].method == "prefix_tuning") == (bundle.kind == "prefix_tuning")
        rule = f"be of the method of adapter {name!r}, {entries[0].method}"
        _checks.require(same, op, bundle.named("table"), rule, bundle.kind)
        rule = f"have shape {list(shape)}, that of adapter {name!r}"
        _checks.require(tuple(bundle.table.shape) == shape, op, bundle.named("table"), rule, list(bundle.table.shape))
        return entries
    modules = targets.walk(manager.model)
    for path, part in bundle.parts.items():
        _check_part(op, path, modules.get(path), part)
    mine, theirs = sorted(entry.path for entry in entries), sorted(bundle.parts)
    rule = f"be on the modules of adapter {name!r}, {mine[:4]}"
    other = sorted(set(mine) ^ set(theirs))
    _checks.require(not other, op, "path", rule, f"{other[:4]} in one of them alone")
    for entry in entries:
        held, part = entry.module, bundle.parts[entry.path]
        variant = any(
            each.__module__.startswith("fastpeft.nn.factors.") for each in type(held).__mro__ if each is not LoRAModule
        )
        plain = not variant or (isinstance(held, Adaptive) and held.form == "svd")
        rule = f"be of the method of adapter {name!r}, {entry.method}"
        gained = isinstance(held, Adaptive) == (part.gain is not None)
        _checks.require(isinstance(held, LoRAModule) and plain and gained, op, part.named("a"), rule, bundle.kind)
        assert isinstance(held, LoRAModule)
        _checks.require(
            held.rank == part.rank, op, part.named("a"), f"have {held.rank} rows, the adapter's rank", part.rank
        )
        biased = held.lora_bias is not None or part.bias is None
        _checks.require(biased, op, part.named("bias"), "be absent for an adapter without a bias", "one")
    return entries


def _whole(op: str, manager: EfficientFineTuningManager, bundle: Bundle) -> dict[str, nn.Module]:
    """{name: module} of the whole modules in the file; each has all of its tensors there, in its shapes."""
    if not bundle.whole:
        return {}
    modules = targets.walk(manager.model)
    named = [path for path in modules if path and any(path == m or path.endswith(f".{m}") for m in bundle.modules)]
    found: dict[str, nn.Module] = {}
    for key, value in bundle.whole.items():
        path = next((each for each in named if key.startswith(f"{each}.")), key.rpartition(".")[0])
        rule = "name a tensor of the model"
        _checks.require(path in modules and path != "", op, bundle.named(key), rule, repr(key))
        state = modules[path].state_dict(keep_vars=True)
        inner = key.removeprefix(f"{path}.")
        _checks.require(inner in state, op, bundle.named(key), rule, repr(key))
        like = state[inner]
        _checks.require(
            value.shape == like.shape, op, bundle.named(key), f"have shape {list(like.shape)}", list(value.shape)
        )
        same = value.is_floating_point() == like.is_floating_point()
        _checks.require_dtype(same, op, bundle.named(key), f"have a dtype like {like.dtype}", value.dtype)
        _check_finite(op, bundle.named(key), value, like.dtype)
        found[path] = modules[path]
    for path, module in found.items():
        inside = [
            each
            for each in (*bundle.parts, *(entry.path for entry in manager.entries))
            if f"{each}.".startswith(f"{path}.")
        ]
        _checks.require(not inside, op, f"the file's {path!r}", "be a module without adapters", inside[:3])
        missing = sorted(key for key in module.state_dict() if f"{path}.{key}" not in bundle.whole)
        _checks.require(not missing, op, f"the file's {path!r}", "hold all tensors of the module", f"no {missing[:3]}")
    check_untied(op, manager.model, bundle)
    others = {path for path in manager.saved_modules if path in found}
    for key, value in bundle.whole.items():
        if key.rpartition(".")[0] in others and len(manager.methods) > 1:
            same = torch.equal(manager.model.get_parameter(key).detach().to(value.dtype).cpu(), value)
            _checks.require(
                same, op, bundle.named(key), "be what the other adapters of the model have there", "other values"
            )
    return found


def _place(
    op: str,
    manager: EfficientFineTuningManager,
    bundle: Bundle,
    name: str,
    method: str | None,
    options: dict[str, Any],
    saved: dict[str, nn.Module],
) -> list[Entry]:
    modules = targets.walk(manager.model)
    each: dict[str, dict[str, Any]] = {}
    for path, part in bundle.parts.items():
        _check_part(op, path, modules.get(path), part)
        first = next(other for other, module in modules.items() if module is modules[path])
        _checks.require(
            first == path, op, part.named("a"), f"go by {first!r}, the first name of its module", repr(path)
        )
        if bundle.kind == "adalora":
            each[path] = {"rank": part.rank, "scaling": part.scaling}
            continue
        each[path] = {"rank": part.rank, "bias": part.bias is not None}
        exact = part.alpha is not None and _of_alpha(part) == part.scaling
        each[path] |= {"alpha": part.alpha, "use_rslora": part.use_rslora} if exact else {"scaling": part.scaling}
    allowed = (None, "adalora") if bundle.kind == "adalora" else (None, "lora", "qlora")
    _checks.one_of(op, "method", method, allowed)
    how = {"dropout": bundle.dropout, **options} | ({"form": "svd"} if bundle.kind == "adalora" else {})
    kind = method or bundle.kind
    return manager._place(op, manager._free_name(op, kind, name), kind, list(each), how, each, saved)


def _of_alpha(part: Part) -> float:
    return float(part.alpha or 0.0) / (math.sqrt(part.rank) if part.use_rslora else part.rank)


def _insert(
    op: str, manager: EfficientFineTuningManager, bundle: Bundle, name: str, options: dict[str, Any]
) -> list[Entry]:
    table, label, model = bundle.table, bundle.named("table"), manager.model
    assert table is not None
    if prompts.is_transformers(model):
        if bundle.kind == "prefix_tuning":
            want = prefix_sizes(model.config)
            _checks.require(want == bundle.sizes, op, label, f"be of the model's {want}", bundle.sizes)
        else:
            width = prompts._width(model)["token_dim"]
            _checks.require(table.shape[1] == width, op, label, f"have {width} columns, the model's", list(table.shape))
    sizes = bundle.sizes if bundle.kind == "prefix_tuning" else {"token_dim": table.shape[1]}
    dropout = {"dropout": bundle.dropout} if bundle.dropout else {}
    how = {
        "num_virtual_tokens": table.shape[0],
        **sizes,
        **dropout,
        "dtype": torch.promote_types(table.dtype, torch.float32),
    }
    manager._prompt(bundle.kind, how | options | {"adapter_name": name})
    return manager._of(name)


def _check_range(op: str, module: Any, bundle: Bundle, part: Part | None) -> None:
    """Check that no value overflows in the dtype of the adapter."""
    if part is None:
        assert bundle.table is not None
        _check_finite(op, bundle.named("table"), bundle.table, next(module.parameters()).dtype)
        return
    for name, value in part.tensors().items():
        _check_finite(op, part.named(name), value, module.lora_A.dtype)


def _check_finite(op: str, name: str, value: torch.Tensor, dtype: torch.dtype) -> None:
    finite = not dtype.is_floating_point or bool(value.to(dtype).isfinite().all())
    _checks.require(finite, op, name, f"be finite in {dtype}, as the model has it", "inf or nan")


def _fill(module: Any, bundle: Bundle, part: Part | None) -> None:
    """Copy the values into an adapter that they fit."""
    if part is None:
        assert bundle.table is not None
        if isinstance(module, PrefixTuning):
            module._store(bundle.table.to(next(module.parameters())))
        else:
            module.load_state_dict({"prompt_embeddings": bundle.table})
        return
    a, b = LoRAModule.factors(module)
    a.copy_(part.a.flatten(1))
    b.copy_(part.b)
    exact = part.alpha is not None and _of_alpha(part) == part.scaling
    module.scaling, module.alpha, module.use_rslora = part.scaling, part.alpha if exact else None, part.use_rslora
    if part.gain is not None:
        module.gains.copy_(part.gain)
        module.max_rank = part.full_rank
    if module.lora_bias is not None:
        module.lora_bias.zero_() if part.bias is None else module.lora_bias.copy_(part.bias)
