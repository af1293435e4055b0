"""Other people's models: put our operators in, take them out. One folder a library; nothing else may enter."""

from fastpeft.integrations.peft import Report, Status, accelerate, reason, restore, status

__all__ = ["Report", "Status", "accelerate", "reason", "restore", "status"]
