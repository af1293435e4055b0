"""Compiles every kernel with no GPU: registers, spills, shared memory."""

import common  # noqa: F401 - fastpeft becomes importable
