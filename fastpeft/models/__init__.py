"""Whole models with LoRA in their own layers: a BERT-like encoder, a classifier over one.

``_adapted`` has what they share: adapting in place, what is trained, its state, merging. transformers is
imported where a name asks for it, never for a model that is given. A new kind of layer does not belong here.
"""

from fastpeft.models.bert import LoRABERT, SentimentClassifier

__all__ = ["LoRABERT", "SentimentClassifier"]
