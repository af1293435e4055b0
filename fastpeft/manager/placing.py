"""Putting adapters into a model and taking them out again, all or none."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fastpeft.manager import methods
from fastpeft.nn import LoRAMultiheadAttention, QLoRALinear, encoder_safe
from fastpeft.nn.init import needs_weight
from fastpeft.nn.layers._parts import Parts
from fastpeft.nn.layers.attention_host import host_of, input_parts, torchs_if_plain
from fastpeft.nn.layers.stack import AdapterStack
from fastpeft.ops import _checks


@dataclass(eq=False)
class Entry:
    """One adapter on one module of the model.

    path       of the adapted module, by the model's own names
    module     the adapter; if ``place`` is "instead", the adapted layer
    place      "instead" of a layer, "inside" an attention, in a "stack" around a layer, "inserted" into a transformers
               model, or "held" by the manager alone
    names      of the module's tensors that belong to the adapter, as in its state dict
    original   the replaced layer; None if it is to be made again from the adapted one
    before     that layer's weights, if the adapter's initial update was subtracted from them
    fixed      names of Parameters that belong to the adapter and are never trained
    """

    adapter: str
    method: str
    path: str
    module: nn.Module
    place: str
    names: tuple[str, ...] = ()
    original: nn.Module | None = None
    before: dict[str, torch.Tensor] = field(default_factory=dict)
    fixed: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        self.fixed = frozenset(name for name, value in self.state().items() if not value.requires_grad)

    def state(self) -> dict[str, torch.Tensor]:
        """The adapter's own tensors: Parameters and buffers themselves, by their names in the module."""
        state: dict[str, torch.Tensor] = self.module.state_dict(keep_vars=True)
        return {name: state[name] for name in self.names if name in state} if self.names else state

    def parameters(self) -> list[nn.Parameter]:
        """The Parameters that an adapter trains while it is switched on."""
        state = {name: value for name, value in self.state().items() if name not in self.fixed}
        return [value for value in state.values() if isinstance(value, nn.Parameter)]

    def forget_packed(self) -> None:
        """Drop the original of a packed weight, since packing is meant to save its memory."""
        if isinstance(self.module, QLoRALinear):
            self.original = None

    def switches(self) -> list[Any]:
        """The modules to enable and disable for this entry."""
        return [*input_parts(self.module).values()] if self.place == "inside" else [self.module]  # type: ignore[arg-type]


@dataclass
class _Plan:
    """Which modules go where; made before anything in the model changes."""

    swaps: dict[int, nn.Module] = field(default_factory=dict)
    hosts: dict[int, LoRAMultiheadAttention] = field(default_factory=dict)
    stacked: list[tuple[AdapterStack, Entry, bool]] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    before: list[tuple[nn.Module, dict[str, torch.Tensor]]] = field(default_factory=list)


class Placer:
    """Adapts modules of ``model`` with one method.

    each       options of individual modules, by path, besides those for all
    """

    def __init__(
        self, op: str, model: nn.Module, adapter: str, method: str, options: dict[str, Any], each: dict[str, Any]
    ) -> None:
        self.op, self.model, self.adapter, self.method = op, model, adapter, method
        self.options, self.each = options, each
        self.plan = _Plan()

    def place(self, found: dict[str, nn.Module], modules: dict[str, nn.Module]) -> list[Entry]:
        """Put an adapter on every module of ``found``.

        modules    of `targets.walk`
        Raises     ValueError, TypeError: from the adapters' constructors; the model is then unchanged.
        """
        flags = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        try:
            for path, module in found.items():
                self._one(path, module, modules)
        except BaseException:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
            for layer, before in self.plan.before:
                _restore(layer, before)
            raise
        plan = self.plan
        for host in plan.hosts.values():
            swap(host, plan.swaps)
        swap(self.model, plan.swaps | plan.hosts)
        for stack, entry, serial in plan.stacked:
            stack.add(self.adapter, entry.module, serial)
        encoder_safe(self.model)
        return plan.entries

    def _one(self, path: str, module: nn.Module, modules: dict[str, nn.Module]) -> None:
        options = self.options | self.each.get(path, {})
        layer = methods.bare(module)
        if self.method == "lora" and isinstance(layer, LoRAMultiheadAttention):
            rule = "name attentions without adapters; their out_proj takes further ones"
            _checks.require(False, self.op, "target_modules", rule, repr(path))
        if self.method == "lora" and methods.is_attention(layer):
            before = self._before(layer, options)
            host = host_of(layer, options)  # type: ignore[arg-type]
            names = tuple(f"{name}.{key}" for name, part in input_parts(host).items() for key in part.state_dict())
            self.plan.hosts[id(layer)] = host
            self.plan.entries.append(Entry(self.adapter, self.method, path, host, "inside", names, None, before))
            self._linear(f"{path}.out_proj", host.out_proj, host.out_proj, options)
        elif type(layer) in methods.OTHERS and self.method == "lora":
            before = self._before(layer, options)
            self._instead(path, layer, methods.OTHERS[type(layer)](original_layer=layer, **options), before)
        elif methods.is_read(layer):
            attention = methods.bare(modules[path.rpartition(".")[0]])
            if id(attention) not in self.plan.hosts:
                self.plan.hosts[id(attention)] = host_of(attention)  # type: ignore[arg-type]
                out = self.plan.hosts[id(attention)].out_proj
                self._linear(path, out, out, options)
        else:
            self._linear(path, module, layer, options)

    def _before(self, layer: nn.Module, options: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Copies of a layer's weights, if its adapter subtracts its initial update from them."""
        init = options.get("init")
        if not isinstance(init, str) or not needs_weight(init):
            return {}
        before = {name: p.detach().clone() for name, p in layer.named_parameters(recurse=False)}
        self.plan.before.append((layer, before))
        return before

    def _linear(self, path: str, there: nn.Module, layer: nn.Module, options: dict[str, Any]) -> None:
        if self.method == "adapter":
            self._stack(path, there, methods.behind(self.op, layer, options), options.get("kind") != "parallel")
        elif methods.takes_place(layer):
            before = self._before(layer, options)
            self._instead(path, layer, methods.LINEAR[self.method].linear(original_layer=layer, **options), before)
        else:
            self._stack(path, there, methods.beside(self.op, self.method, layer, options), False)

    def _instead(self, path: str, layer: nn.Module, made: nn.Module, before: dict[str, torch.Tensor]) -> None:
        base = layer.state_dict().keys() | {"weight", "bias"}
        names = tuple(key for key in made.state_dict() if key not in base and not key.startswith("weight."))
        self.plan.entries.append(Entry(self.adapter, self.method, path, made, "instead", names, layer, before))
        self.plan.swaps[id(layer)] = made

    def _stack(self, path: str, there: nn.Module, made: nn.Module, serial: bool) -> None:
        stack = there
        if not isinstance(stack, AdapterStack):
            stack = self.plan.swaps[id(there)] = AdapterStack(there)
        _checks.require(self.adapter not in stack.names(), self.op, "adapter_name", "be free", repr(self.adapter))
        entry = Entry(self.adapter, self.method, path, made, "stack")
        self.plan.entries.append(entry)
        self.plan.stacked.append((stack, entry, serial))


def swap(model: nn.Module, new: dict[int, nn.Module]) -> None:
    """Replace every module in ``model`` by ``new[id(module)]``, under all of its names, following chains."""
    held = [(holder, name) for holder in model.modules() for name, child in holder._modules.items() if id(child) in new]
    for holder, name in held:
        child = holder._modules[name]
        while child is not None and id(child) in new:
            child = new[id(child)]
        holder._modules[name] = child


def take_out(model: nn.Module, entries: list[Entry]) -> None:
    """Restore the modules as they were before ``entries``; merged updates stay in the weights.

    Attentions and encoders that have no adapter left inside become torch's again.
    """
    stacks = [module for module in model.modules() if isinstance(module, AdapterStack)]
    stack_of = {id(each): stack for stack in stacks for each in (*stack.parallel.values(), *stack.serial.values())}
    gone: dict[int, nn.Module] = {}
    for entry in reversed(entries):
        if entry.place == "stack":
            stack = stack_of[id(entry.module)]
            stack.pop(entry.adapter)
            if not stack.names():
                gone[id(stack)] = stack.layer
        elif entry.place == "inside":
            parts = input_parts(entry.module)  # type: ignore[arg-type]
            if not any(part.merged for part in parts.values()):
                _restore(entry.module, entry.before)
            for name in parts:
                del entry.module._modules[name]
        elif entry.place == "instead":
            gone[id(entry.module)] = _plain(entry)
    swap(model, gone)
    hosts = {id(m): torchs_if_plain(m) for m in model.modules() if isinstance(m, LoRAMultiheadAttention)}
    swap(model, {key: plain for key, plain in hosts.items() if plain is not None})
    encoder_safe(model)


@torch.no_grad()
def _restore(layer: nn.Module, before: dict[str, torch.Tensor]) -> None:
    for name, value in before.items():
        layer.get_parameter(name).copy_(value)


def _plain(entry: Entry) -> nn.Module:
    """The original module, with the adapted module's current parameters (moved, cast or merged)."""
    adapted: Any = entry.module
    if entry.original is None:
        if not adapted.merged:
            adapted.disable()
        made: nn.Module = adapted.to_linear()
        return made
    if not adapted.merged:
        _restore(adapted, entry.before)
    original = entry.original
    if isinstance(adapted, QLoRALinear):
        return original.train(adapted.training)
    for name, _ in [*original.named_parameters(recurse=False)]:
        original._parameters[name] = adapted._parameters[name]
    if not isinstance(adapted, Parts):
        # A lora_bias was merged into a base without a bias.
        original.register_parameter("bias", adapted._parameters["bias"])
    elif isinstance(original, nn.RNNBase):
        original._init_flat_weights()
    return original.train(adapted.training)
