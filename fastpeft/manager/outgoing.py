"""An adapter of a manager, or of a model that was built from modules, as a `Bundle`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastpeft.files.bundle import PROMPTS, Bundle, Part, common
from fastpeft.manager import methods, prompts, targets
from fastpeft.manager.manager import EfficientFineTuningManager
from fastpeft.manager.placing import Entry
from fastpeft.nn import LoRALayer, LoRAModule, LoRAMultiheadAttention, Mergeable
from fastpeft.nn.factors import Adaptive
from fastpeft.nn.init import needs_weight
from fastpeft.nn.layers.attention_host import input_parts
from fastpeft.nn.layers.stack import AdapterStack
from fastpeft.nn.prompts import PromptEmbedding
from fastpeft.nn.prompts.prefix import Prefix
from fastpeft.nn.prompts.virtual import VirtualTokens
from fastpeft.ops import _checks

DEFAULT = "default"


def manager_of(op: str, source: Any) -> EfficientFineTuningManager:
    """The manager itself; or a new one that accounts for the adapters that a model already has.

    A module that replaces a layer is the layer's adapter "default"; a stacked adapter has its own name.
    Raises     TypeError: neither a manager nor a model.  ValueError: a PEFT model.
    """
    if isinstance(source, EfficientFineTuningManager):
        return source
    # The wrappers of torch.compile and DDP are not part of a model's names.
    while hasattr(source, "_orig_mod") or isinstance(source, nn.parallel.DistributedDataParallel):
        source = getattr(source, "_orig_mod", None) or source.module
    _checks.require_dtype(
        isinstance(source, nn.Module), op, "source", "be a manager or an nn.Module", type(source).__name__
    )
    rule = "hold no adapters of PEFT: its own save_pretrained and load_adapter serve them, accelerated or not"
    _checks.require(not hasattr(source, "peft_config"), op, "model", rule, type(source).__name__)
    manager = EfficientFineTuningManager(source)
    for path, module in targets.walk(source).items():
        _take_account(manager, path, module)
    for entry in manager.entries:
        manager.methods.setdefault(entry.adapter, {"method": entry.method, "options": {}, "each": {}})
    return manager


def _take_account(manager: EfficientFineTuningManager, path: str, module: nn.Module) -> None:
    def note(adapter: str, held: nn.Module, place: str, names: tuple[str, ...] = ()) -> None:
        method = next((m for m, kind in methods.LINEAR.items() if type(held) in (kind.linear, kind.beside)), "lora")
        manager.entries.append(Entry(adapter, method, path, held, place, names))

    if isinstance(module, VirtualTokens):
        kind = "prefix_tuning" if isinstance(module, Prefix) else "prompt_tuning"
        kind = "ptuning" if kind == "prompt_tuning" and not isinstance(module, PromptEmbedding) else kind
        manager.entries.append(Entry(DEFAULT, kind, "", module, "inserted"))
        return
    if isinstance(module, AdapterStack):
        for name in module.names():
            note(name, (module.parallel if name in module.parallel else module.serial)[name], "stack")
    layer = methods.bare(module)
    if isinstance(layer, LoRAMultiheadAttention):
        parts = input_parts(layer)
        if parts:
            names = tuple(f"{name}.{key}" for name, part in parts.items() for key in part.state_dict())
            manager.entries.append(Entry(DEFAULT, "lora", path, layer, "inside", names))
    elif isinstance(layer, LoRAModule):
        note(DEFAULT, layer, "instead", own_names(layer))


def own_names(layer: nn.Module) -> tuple[str, ...]:
    """The adapter's tensors of an adapted layer, by their names in its state dict."""
    return tuple(key for key in layer.state_dict() if key not in ("weight", "bias") and not key.startswith("weight."))


def bundle_of(op: str, manager: EfficientFineTuningManager, adapter: str | None, saved: dict[str, nn.Module]) -> Bundle:
    """The adapter of that name, or the only one, with the modules ``saved`` as whole modules.

    Raises     ValueError: no adapter, several but no name, or one that no other library's format can hold.
    """
    known = sorted(manager.methods)
    _checks.require(bool(known), op, "source", "have adapters", "none")
    _checks.require(adapter is not None or len(known) == 1, op, "adapter", f"be one of {known}", None)
    entries = manager._of(known[0] if adapter is None else adapter)
    hosts = {id(m.out_proj) for m in manager.model.modules() if isinstance(m, LoRAMultiheadAttention)}
    whole = {f"{path}.{key}": value.detach() for path, module in saved.items()
             for key, value in module.state_dict().items()}  # fmt: skip
    table = next((entry for entry in entries if isinstance(entry.module, VirtualTokens)), None)
    if table is not None:
        bundle = _prompt_bundle(op, manager.model, table)
    else:
        parts = {entry.path: _part(op, entry, hosts) for entry in entries}
        gains = {part.gain is not None for part in parts.values()}
        kind = "adalora" if common(op, "the method", gains) else "lora"
        drops = (entry.module.dropout_probability for entry in entries)
        bundle = Bundle(kind, parts, common(op, "dropout", drops))
    bundle.whole, bundle.modules = whole, list(saved)
    check_untied(op, manager.model, bundle)
    for name, value in _tensors(bundle):
        plain = not hasattr(value, "full_tensor") and not value.is_meta
        _checks.require(plain, op, name, "be a whole tensor", type(value).__name__)
        finite = not value.is_floating_point() or bool(value.isfinite().all())
        _checks.require(finite, op, name, "be finite", "inf or nan")
    return bundle


def check_untied(op: str, model: nn.Module, bundle: Bundle) -> None:
    """Check that no whole module's Parameter is tied: PEFT would train a copy and leave the other module unchanged.

    Raises     ValueError: a tied Parameter, unless the adapter has it under each of its names.
    """
    held: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        held.setdefault(id(parameter), []).append(name)
    for group in held.values():
        inside = [name for name in group if name in bundle.whole]
        outside = [name for name in group if name not in bundle.whole]
        outside += [name for name in inside if not torch.equal(bundle.whole[name], bundle.whole[inside[0]])]
        rule = "be untied, or come under all of its names, where its module is trained whole"
        _checks.require(not inside or not outside, op, bundle.named(inside[0]) if inside else "", rule, outside[:3])


def _tensors(bundle: Bundle) -> list[tuple[str, torch.Tensor]]:
    found = [
        (f"{path} ({name})", value) for path, part in bundle.parts.items() for name, value in part.tensors().items()
    ]
    found += [("the virtual tokens", bundle.table)] if bundle.table is not None else []
    return found + list(bundle.whole.items())


def _part(op: str, entry: Entry, hosts: set[int]) -> Part:
    module: Any = entry.module
    what = f"adapter {entry.adapter!r} on {entry.path!r}"
    rule = "be LoRA on a linear layer or a convolution for the formats of others (save_efficient_weights takes any)"
    # A LoRALayer that the model calls itself is beside no layer that a file could name.
    beside = isinstance(module, LoRALayer) and entry.place == "stack"
    over = isinstance(module, Mergeable) and (hasattr(module, "kernel_size") or methods.sizes(module) is not None)
    layered = (beside or over) and id(module) not in hosts
    _checks.require(layered, op, what, rule, type(module).__name__)
    changed = needs_weight(module.init)
    rule = "leave the base weights as they were: its init took a part out of them; merge() and save the whole model"
    _checks.require(not changed, op, what, rule, f"init={module.init!r}")
    gain = full = None
    if isinstance(module, Adaptive) and module.form == "svd":
        a, b = LoRAModule.factors(module)
        gain, full = module.gains.detach(), module.max_rank
    else:
        a, b = module._pair()  # raises if the update is not a matrix
    a, b = a.detach(), b.detach()
    if hasattr(module, "kernel_size"):
        a = a.reshape(a.shape[0], -1, *module.kernel_size)
    bias = None if module.lora_bias is None else module.lora_bias.detach()
    return Part(a, b, float(module.scaling), gain, bias, full, module.alpha, module.use_rslora)


def _prompt_bundle(op: str, model: nn.Module, entry: Entry) -> Bundle:
    module: Any = entry.module
    kind = entry.method if entry.method in PROMPTS else "prompt_tuning"
    sizes: dict[str, int] = {}
    if isinstance(module, Prefix):
        sizes = {"num_layers": module.num_layers, "num_kv_heads": module.num_heads, "head_dim": module.head_dim}
    if prompts.is_transformers(model):
        config: Any = model.config
        text = config.get_text_config()
        sizes.setdefault("num_layers", text.num_hidden_layers)
        sizes["num_heads"] = text.num_attention_heads
    with torch.no_grad():
        return Bundle(kind, table=module.encode().detach(), dropout=module.dropout_probability, sizes=sizes)
