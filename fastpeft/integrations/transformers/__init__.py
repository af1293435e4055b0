"""transformers' trainers: `AccelerateCallback`. transformers is imported when one is made, and not before."""

from fastpeft.integrations.transformers.callback import AccelerateCallback

__all__ = ["AccelerateCallback"]
