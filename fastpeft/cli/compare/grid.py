"""``--methods`` and ``--grid``: the methods, and the options of each."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fastpeft.cli.compare.methods import METHODS
from fastpeft.cli.compare.record import point_key


def nearest(name: str, known: Iterable[str]) -> str:
    """A suggestion, in words, of what ``name`` may have meant."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.4)
    return f"; did you mean {near[0]}?" if near else ""


def known(option: str, name: str, names: Iterable[str]) -> None:
    """Raises     ValueError: ``name`` is none of ``names``; the text has the nearest one."""
    every = list(names)
    if name not in every:
        raise ValueError(f"compare: {option} must be among {', '.join(every)}, got {name!r}{nearest(name, every)}")


def methods(text: str) -> list[str]:
    """The names in a comma-separated list, each once."""
    chosen = [name.strip() for name in text.split(",") if name.strip()]
    for name in chosen:
        known("--methods", name, METHODS)
    if not chosen:
        raise ValueError("compare: --methods must name at least one method, got none")
    return list(dict.fromkeys(chosen))


def grid(words: Sequence[str], chosen: Sequence[str]) -> dict[str, list[Any]]:
    """``rank=4,8 lr=1e-3`` as {option: values}.

    Raises     ValueError: an option that no chosen method has, no values, a value of another type than the default.
    """
    options = dict.fromkeys(["lr", *(option for name in chosen for option in METHODS[name].options)])
    found: dict[str, list[Any]] = {}
    for word in words:
        name, equals, values = word.partition("=")
        if not equals or not values:
            raise ValueError(f"compare: --grid must be options with values, as rank=4,8, got {word!r}")
        known("--grid", name, options)
        found[name] = [_value(name, value, chosen) for value in values.split(",") if value]
    return found


def _value(option: str, text: str, chosen: Sequence[str]) -> Any:
    """The value as the number, or the word, that the option takes."""
    defaults = (METHODS[name].options[option] for name in chosen if option in METHODS[name].options)
    default = next((each for each in defaults if each is not None), 1.0 if option in ("lr", "alpha") else 1)
    kind = type(default)
    try:
        return kind(text)
    except ValueError as error:
        raise ValueError(f"compare: --grid {option} must be of kind {kind.__name__}, got {text!r}") from error


def points(chosen: Sequence[str], wanted: Mapping[str, Sequence[Any]]) -> dict[str, tuple[str, dict[str, Any]]]:
    """{key: (method, options)}: every combination of a method's options; a method with none of them appears once."""
    made: dict[str, tuple[str, dict[str, Any]]] = {}
    for name in chosen:
        own = [option for option in wanted if option in METHODS[name].options or (option == "lr" and name != "none")]
        for values in itertools.product(*(wanted[option] for option in own)):
            options = dict(zip(own, values, strict=True))
            made[point_key(name, options)] = (name, options)
    return made
