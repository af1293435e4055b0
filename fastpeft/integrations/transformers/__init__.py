"""transformers' trainers: `AccelerateCallback`. transformers is not imported before a callback is made."""

from fastpeft.integrations.transformers.callback import AccelerateCallback

__all__ = ["AccelerateCallback"]
