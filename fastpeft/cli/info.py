"""``fastpeft info``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import fastpeft


def main(arguments: Sequence[str]) -> int:
    """Print what `fastpeft.info` gives."""
    argparse.ArgumentParser("fastpeft info", description="Versions and backends of this installation.").parse_args(
        arguments
    )
    print(fastpeft.info())
    return 0
