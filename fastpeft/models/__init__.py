"""Whole models with LoRA in their own layers: a BERT-like encoder, a classifier over one, an image classifier.

``_adapted`` has what they share: adapting in place, the trained part and its state, merging. transformers and
torchvision are imported only to make a model, never for a given one. A new kind of layer does not belong here.
"""

from fastpeft.models.bert import LoRABERT, SentimentClassifier
from fastpeft.models.resnet import LoRAResNet

__all__ = ["LoRABERT", "LoRAResNet", "SentimentClassifier"]
