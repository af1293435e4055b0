"""One of each module of fastpeft.nn that computes, with an update that acts, and inputs for it."""

import torch
from torch import nn

import fastpeft
from fastpeft.nn import (
    AdaLoRALayer,
    AdaLoRALinear,
    Adapter,
    AdapterFusion,
    AttentionGuidedLoRALayer,
    AttentionGuidedLoRALinear,
    ConditionalLoRALayer,
    ConditionalLoRALinear,
    HyperLoRALayer,
    HyperLoRALinear,
    LoRAConv1d,
    LoRAConv2d,
    LoRAConv3d,
    LoRAGRU,
    LoRAGRUCell,
    LoRALayer,
    LoRALinear,
    LoRALSTM,
    LoRALSTMCell,
    LoRAMultiheadAttention,
    LoRARNN,
    LoRARNNCell,
    PruningAwareLoRALayer,
    PruningAwareLoRALinear,
    SparseLoRALayer,
    SparseLoRALinear,
    add_parametrization,
)  # fmt: skip

K, N = 6, 5
LEARNT = ("lora_B", "lora_bias", "lora_E", "up.weight", "up.bias", "hyper_net.2.weight")


def parametrized(layer):
    add_parametrization(layer, 2, 4.0)
    return layer


def table(dtype):
    """{name: (make(**options), inputs)}; options are those that every LoRA module takes."""

    def linear():
        return nn.Linear(K, N, dtype=dtype)

    def draw(*shape):
        return torch.randn(*shape, dtype=dtype)

    def conv(kind, dims):
        base = getattr(nn, f"Conv{dims}d")
        return lambda **o: kind.from_conv(base(4, 6, 3, padding=1, dtype=dtype), **o), (draw(2, 4, *[4] * dims),)

    def cell(kind, base):
        return lambda **o: kind.from_cell(base(K, N, dtype=dtype), **o)

    def sequence(kind, base):
        return lambda **o: kind.from_rnn(base(K, N, 2, bidirectional=True, dtype=dtype), **o), (draw(3, 2, K),)

    x, h, e, q = draw(3, K), draw(3, N), draw(3, 7), draw(3, 2, 8)
    made = {
        "Adapter": (lambda backend=None, **o: Adapter(K, 3, backend=backend, dtype=dtype), (x,)),
        "AdapterFusion": (lambda **o: AdapterFusion(K, [Adapter(K, 3, dtype=dtype) for _ in range(2)]), (x,)),
        "HyperLoRALinear": (lambda **o: HyperLoRALinear.from_linear(linear(), task_embedding_dim=7, **o), (x, e)),
        "HyperLoRALinear of one": (
            lambda **o: HyperLoRALinear.from_linear(linear(), task_embedding_dim=7, **o), (x, e[0])
        ),
        "HyperLoRALayer": (lambda **o: HyperLoRALayer(K, N, task_embedding_dim=7, dtype=dtype, **o), (x, e)),
        "ConditionalLoRALinear": (
            lambda **o: ConditionalLoRALinear.from_linear(linear(), num_tasks=2, **o), (x, torch.tensor([0, 1, -1]))
        ),
        "ConditionalLoRALayer": (lambda **o: ConditionalLoRALayer(K, N, num_tasks=2, dtype=dtype, **o), (x, 1)),
        "LoRARNNCell": (cell(LoRARNNCell, nn.RNNCell), (x, h)),
        "LoRAGRUCell": (cell(LoRAGRUCell, nn.GRUCell), (x, h)),
        "LoRALSTMCell": (cell(LoRALSTMCell, nn.LSTMCell), (x, (h, h.clone()))),
        "LoRARNN": sequence(LoRARNN, nn.RNN),
        "LoRAGRU": sequence(LoRAGRU, nn.GRU),
        "LoRALSTM": sequence(LoRALSTM, nn.LSTM),
        "LoRAMultiheadAttention": (
            lambda **o: LoRAMultiheadAttention.from_attention(nn.MultiheadAttention(8, 2, dtype=dtype), **o), (q, q, q)
        ),
        "LoRAMultiheadAttention apart": (
            lambda **o: LoRAMultiheadAttention.from_attention(
                nn.MultiheadAttention(8, 2, kdim=K, vdim=K, dtype=dtype), **o
            ),
            (q, draw(4, 2, K), draw(4, 2, K)),
        ),
        "LoRAParametrization": (lambda **o: parametrized(linear()), (x,)),
        "LoRAConv1d": conv(LoRAConv1d, 1),
        "LoRAConv2d": conv(LoRAConv2d, 2),
        "LoRAConv3d": conv(LoRAConv3d, 3),
    }  # fmt: skip
    for kind in (LoRALayer, AdaLoRALayer, SparseLoRALayer, PruningAwareLoRALayer, AttentionGuidedLoRALayer):
        made[kind.__name__] = lambda kind=kind, **o: kind(input_dimension=K, output_dimension=N, dtype=dtype, **o), (x,)
    for kind in (LoRALinear, AdaLoRALinear, SparseLoRALinear, PruningAwareLoRALinear, AttentionGuidedLoRALinear):
        made[kind.__name__] = lambda kind=kind, **o: kind.from_linear(linear(), **o), (x,)
    made["AdaLoRALinear svd"] = lambda **o: AdaLoRALinear.from_linear(linear(), form="svd", **o), (x,)
    return made


NAMES = list(table(torch.float32))


def build(name, dtype=torch.float32, **options):
    """(module, inputs), the same at every call."""
    torch.manual_seed(0)
    make, inputs = table(dtype)[name]
    module = make(**{"rank": 4, "alpha": 8.0, "dropout": 0.0, **options})
    with torch.no_grad():
        for key, parameter in module.named_parameters():
            if key.endswith(LEARNT):
                parameter.normal_(0, 0.3)
    for child in module.modules():
        if hasattr(child, "remask"):
            child.remask()
    return module, inputs


def call(module, inputs, x):
    """The module on ``inputs`` with x in the place of the first one, wherever that is."""
    return flat(module(*(x if given is inputs[0] else given for given in inputs)))


def flat(value):
    if isinstance(value, torch.Tensor):
        return [value]
    return [] if value is None else [each for part in value for each in flat(part)]


def missing():
    """The public modules with a forward of x that the table has not."""
    kinds = (fastpeft.LoRALayer.__mro__[1], nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention, Adapter, AdapterFusion)
    public = {name for name in fastpeft.__all__ if isinstance(getattr(fastpeft, name), type)}
    ours = {name for name in public if issubclass(getattr(fastpeft, name), kinds)}
    return ours - {name.split()[0] for name in NAMES} - {"QLoRALinear"}  # tests/nn/test_nn_qlora.py
