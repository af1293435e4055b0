"""Other people's models: put our operators in, take them out. One folder a library; nothing else may enter."""

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
