"""Other people's models: put our operators in, take them out."""

from fastpeft.integrations.peft import accelerate, restore
from fastpeft.integrations.peft_report import Report

__all__ = ["Report", "accelerate", "restore"]
