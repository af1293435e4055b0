"""Times tiles, strategies and limits on a GPU and writes the tables that the kernels read."""

import common  # noqa: F401 - fastpeft becomes importable
