"""Kernels that no operator uses: timed by `make gpu ARGS=--experiments`, never by default, to say what comes next."""

import common  # noqa: F401 - fastpeft becomes importable
