"""Other people's models: put our operators in, take them out. One folder a library; nothing else may enter."""

from fastpeft.integrations.peft import Report, accelerate, reason, restore

__all__ = ["Report", "accelerate", "reason", "restore"]
