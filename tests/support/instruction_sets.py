"""The instruction sets of the C++ extension, for tests that run in each of them."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest


def isas() -> list[str]:
    """The names in the table of csrc/simd/dispatch.cpp; none where the extension is not built."""
    try:
        from fastpeft import _native
    except ImportError:
        return []
    return _native.isas()


@contextmanager
def running(isa: str) -> Iterator[None]:
    """Runs in ``isa``; skips the test where this processor cannot."""
    from fastpeft import _native

    try:
        _native.set_isa(isa)
    except ValueError as error:
        pytest.skip(str(error))
    try:
        yield
    finally:
        _native.set_isa("auto")
