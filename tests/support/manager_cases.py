"""The models that the tests of fastpeft.manager share."""

import torch
from torch import nn


class Small(nn.Module):
    """Linear layers of two shapes, one of them square, and a head."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.body = nn.ModuleDict({"a": nn.Linear(8, 8, dtype=dtype), "b": nn.Linear(8, 12, dtype=dtype)})
        self.head = nn.Linear(12, 3, dtype=dtype)

    def forward(self, x):
        return self.head(torch.relu(self.body["b"](torch.relu(self.body["a"](x)))))


def encoder(batch_first=True, **options):
    """The documents' own: a TransformerEncoder."""
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=batch_first, **options)
    return nn.TransformerEncoder(layer, 2)


@torch.no_grad()
def train(manager):
    """Values that no init gives, into everything that is trained."""
    for parameter in manager.get_trainable_parameters():
        parameter.normal_(0, 0.3)
    for module in manager.model.modules():
        if hasattr(module, "remask"):
            module.remask()
    return manager


def picture(model):
    """What must be as it was after an error: modules by identity, parameters by value, flags."""
    modules = [(name, id(module), type(module)) for name, module in model.named_modules()]
    parameters = {name: (p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()}
    return modules, parameters, {name: m.training for name, m in model.named_modules()}


def assert_same(before, after):
    assert before[0] == after[0] and before[2] == after[2]
    assert before[1].keys() == after[1].keys()
    for name, (flag, value) in before[1].items():
        assert after[1][name][0] == flag, name
        assert torch.equal(after[1][name][1], value), name
