"""Other people's models: put our operators in, take them out. One folder per library; nothing else belongs here."""

from fastpeft.integrations.peft import Patch, Report, Status, accelerate, patch, reason, restore, status, unpatch
from fastpeft.integrations.transformers import AccelerateCallback

__all__ = [
    "AccelerateCallback",
    "Patch",
    "Report",
    "Status",
    "accelerate",
    "patch",
    "reason",
    "restore",
    "status",
    "unpatch",
]
