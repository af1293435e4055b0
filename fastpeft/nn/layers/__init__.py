"""Layers: each owns a base, its product, its merge and its files. No variant's name may enter here."""

from fastpeft.nn.layers.lora_attention import LoRAMultiheadAttention
from fastpeft.nn.layers.lora_cell import LoRAGRUCell, LoRALSTMCell, LoRARNNCell
from fastpeft.nn.layers.lora_conv import LoRAConv1d, LoRAConv2d, LoRAConv3d
from fastpeft.nn.layers.lora_layer import LoRALayer
from fastpeft.nn.layers.lora_linear import LoRALinear
from fastpeft.nn.layers.lora_rnn import LoRAGRU, LoRALSTM, LoRARNN
from fastpeft.nn.layers.parametrization import LoRAParametrization, add_parametrization
from fastpeft.nn.layers.qlora_linear import QLoRALinear

__all__ = [
    "LoRAConv1d",
    "LoRAConv2d",
    "LoRAConv3d",
    "LoRAGRU",
    "LoRAGRUCell",
    "LoRALSTM",
    "LoRALSTMCell",
    "LoRALayer",
    "LoRALinear",
    "LoRAMultiheadAttention",
    "LoRAParametrization",
    "LoRARNN",
    "LoRARNNCell",
    "QLoRALinear",
    "add_parametrization",
]
