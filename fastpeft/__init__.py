"""fastpeft: parameter-efficient fine-tuning at the price of the frozen model."""

from fastpeft import ops
from fastpeft._version import __version__

__all__ = ["__version__", "ops"]
