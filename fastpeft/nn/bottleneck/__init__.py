"""Bottleneck adapters and their fusion: modules of their own beside LoRA. No base weight may enter here."""

from fastpeft.nn.bottleneck.adapter import Adapter
from fastpeft.nn.bottleneck.fusion import AdapterFusion

__all__ = ["Adapter", "AdapterFusion"]
