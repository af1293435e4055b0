"""Resolves a list of targets to modules of a model."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence

from torch import nn

from fastpeft.nn import Adapter, LoRAModule
from fastpeft.nn.layers.stack import AdapterStack
from fastpeft.nn.prompts import VirtualTokens
from fastpeft.ops import _checks

Supported = Callable[[nn.Module], bool]


def walk(model: nn.Module) -> dict[str, nn.Module]:
    """{path: module} by the model's names before it was adapted; a module is listed under each of its names.

    A stack of adapters is at its layer's path; modules inside an adapter or an adapted layer are not listed.
    """
    return dict(_walk(model, "", ()))


def _walk(module: nn.Module, path: str, holders: tuple[int, ...]) -> Iterator[tuple[str, nn.Module]]:
    yield path, module
    layer = module.layer if isinstance(module, AdapterStack) else module
    if isinstance(layer, (LoRAModule, Adapter, VirtualTokens)):
        return
    for name, child in layer._modules.items():
        if child is not None and id(child) not in holders:
            yield from _walk(child, f"{path}.{name}" if path else name, (*holders, id(layer)))


def listed(op: str, targets: object, name: str = "target_modules") -> list[str]:
    """The given names, one or several.

    Raises     TypeError: not names.  ValueError: no name.
    """
    names = [targets] if isinstance(targets, str) else targets
    rule = "be a name, a regular expression, or a list of such"
    sound = isinstance(names, Iterable) and not isinstance(names, dict)
    names = list(names) if sound else []  # type: ignore[call-overload]
    sound = sound and all(isinstance(each, str) for each in names)
    _checks.require_dtype(sound, op, name, rule, repr(targets))
    _checks.require(bool(names), op, name, "name at least one module", repr(targets))
    return names


def _matching(target: str, names: Sequence[str]) -> list[str]:
    """Names that match exactly, else by dotted suffix, else by a regular expression for the whole name."""
    exact = [name for name in names if name == target]
    suffixed = exact or [name for name in names if name.endswith("." + target)]
    if suffixed or not target:
        return suffixed
    try:
        pattern = re.compile(target)
    except re.error:
        return []
    return [name for name in names if name and pattern.fullmatch(name)]


def _close(target: str, names: Sequence[str]) -> str:
    """The names closest to ``target``, compared whole or from some dot on."""
    known = {name.split(".", cut)[-1]: None for name in names if name for cut in range(name.count(".") + 1)}
    near = difflib.get_close_matches(target, known, n=6, cutoff=0.5)
    near = [name for name in near if not any(name.endswith("." + shorter) for shorter in near)][:3]
    some = list(dict.fromkeys(name.rpartition(".")[2] for name in names if name))[:12]
    return f"nothing matches; close: {', '.join(near)}" if near else f"nothing matches; the model has {', '.join(some)}"


def find(
    op: str,
    modules: dict[str, nn.Module],
    targets: object,
    supported: Supported,
    what: str,
    name: str = "target_modules",
) -> dict[str, nn.Module]:
    """{path: module} of the ``supported`` modules that ``targets`` match, in order, each module once.

    modules    of `walk`
    targets    a name or several: of a module, the end of its dotted name, or a regular expression for the whole of it.
               A name of a container means all supported modules below it
    what       describes the supported modules in an error
    Raises     ValueError: a target that matches nothing, or nothing supported.  TypeError: not names.
    """
    names = list(modules)
    found: set[str] = set()
    for target in listed(op, targets, name):
        matched = _matching(target, names)
        _checks.require(bool(matched), op, name, "match modules of the model", f"{target!r}: {_close(target, names)}")
        served: set[str] = set()
        for path in matched:
            served |= {path} if supported(modules[path]) else _below(modules, path, supported)
        kinds = ", ".join(sorted({type(modules[path]).__name__ for path in matched}))
        _checks.require(bool(served), op, name, f"match {what}, or what holds such", f"{target!r}: {kinds}")
        found |= served
    once: dict[int, str] = {}
    for path, module in modules.items():
        if path in found:
            once.setdefault(id(module), path)
    return {path: modules[path] for path in once.values()}


def _below(modules: dict[str, nn.Module], container: str, supported: Supported) -> set[str]:
    """The outermost supported modules in a container."""
    prefix = container + "." if container else ""
    inside: list[str] = []
    for path, module in modules.items():
        if not path.startswith(prefix) or path == container or not supported(module):
            continue
        if not any(path.startswith(outer + ".") for outer in inside):
            inside.append(path)
    return set(inside)
