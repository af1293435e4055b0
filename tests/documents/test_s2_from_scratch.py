"""S2, LoRA from scratch as a parametrization: the digit experiment as it describes it, and what is decided about it."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

import fastpeft
from fastpeft import (
    LoRALayer,
    LoRALinear,
    LoRAParametrization,
    add_parametrization,
    disable_lora,
    enable_lora,
    lora_disabled,
)


class NNClassifier(nn.Module):
    """The document's MLP."""

    def __init__(self, inputs=784, h1=1000, h2=2000, device=None):
        super().__init__()
        self.fc1 = nn.Linear(inputs, h1, device=device)
        self.fc2 = nn.Linear(h1, h2, device=device)
        self.fc3 = nn.Linear(h2, 10, device=device)

    def forward(self, x):
        return self.fc3(torch.relu(self.fc2(torch.relu(self.fc1(x.flatten(1))))))


def digits(n=400):
    """Ten classes in 36 pixels, two of which are hard to tell apart."""
    generator = torch.Generator().manual_seed(5)
    centres = torch.randn(10, 36, generator=generator)
    centres[2] = centres[3] + 0.3 * torch.randn(36, generator=generator)
    targets = torch.arange(n) % 10
    return centres[targets] + 0.6 * torch.randn(n, 36, generator=generator), targets


def train(net, data, targets, steps, lr=5e-3):
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(net(data), targets).backward()
        optimizer.step()


@torch.no_grad()
def errors(net, data, targets):
    """Mistakes of each digit."""
    wrong = net(data).argmax(1) != targets
    return torch.stack([(wrong & (targets == digit)).sum() for digit in range(10)])


def test_experiment():
    """Train, find the worst digit, fine-tune it with rank 1, find the weights untouched, and take LoRA out again."""
    data, targets = digits()
    net = NNClassifier(36, 24, 32)
    train(net, data, targets, 25)
    original_weights = {name: p.clone() for name, p in net.named_parameters()}
    before = errors(net, data, targets)
    digit = int(before.argmax())
    assert before[digit] > 0
    for layer in (net.fc1, net.fc2, net.fc3):
        add_parametrization(layer, rank=1, alpha=1)
    for name, param in net.named_parameters():
        if "lora" not in name:
            param.requires_grad = False
    idx = targets == digit
    train(net, data[idx], targets[idx], 30)
    assert errors(net, data, targets)[digit] < before[digit]
    for layer, name in ((net.fc1, "fc1"), (net.fc2, "fc2"), (net.fc3, "fc3")):
        original = layer.parametrizations.weight.original
        assert torch.equal(original, original_weights[f"{name}.weight"])
        lora = layer.parametrizations.weight[0]
        assert torch.equal(layer.weight, original + (lora.lora_B @ lora.lora_A) * lora.scale)
        assert torch.equal(layer.bias, original_weights[f"{name}.bias"])
    disable_lora(net)
    assert torch.equal(net.fc1.weight, original_weights["fc1.weight"])
    assert torch.equal(errors(net, data, targets), before)
    enable_lora(net)
    assert errors(net, data, targets)[digit] < before[digit]
    with lora_disabled(net):
        assert torch.equal(errors(net, data, targets), before)


def test_svd():
    """The document's first step: W of rank 2 as B A of its singular vectors, in fewer numbers, gives the same y."""
    W, bias, x = torch.randn(10, 2) @ torch.randn(2, 12), torch.randn(10), torch.randn(12)
    U, S, V = torch.svd(W)
    layer = LoRALayer(12, 10, rank=2, scaling=1.0, dropout=0.0)
    with torch.no_grad():
        layer.lora_B.copy_(U[:, :2] * S[:2])
        layer.lora_A.copy_(V[:, :2].t())
    torch.testing.assert_close(layer(x) + bias, W @ x + bias, rtol=1e-4, atol=1e-4)
    assert sum(p.numel() for p in layer.parameters()) == 44 < W.numel()


def test_usage_of_the_class():
    """LoRaParameterization(features_in, features_out, rank=1, alpha=1, device), registered by hand."""
    layer = nn.Linear(6, 4)
    features_in, features_out = layer.weight.shape
    update = LoRAParametrization(features_in, features_out, 1, 1, layer.weight.device)
    parametrize.register_parametrization(layer, "weight", update)
    assert update.lora_A.shape == (1, 6) and update.lora_B.shape == (4, 1) and not update.lora_B.any()
    with torch.no_grad():
        update.lora_B.normal_()
    x = torch.randn(3, 6)
    W = layer.parametrizations.weight.original
    torch.testing.assert_close(layer(x), F.linear(x, W + update.lora_B @ update.lora_A, layer.bias))
    update.enabled = False
    assert torch.equal(layer.weight, W)


def test_decision_21_scale():
    """The document computes alpha / r and forgets it."""
    layer = nn.Linear(6, 4)
    update = add_parametrization(layer, rank=2, alpha=8)
    with torch.no_grad():
        update.lora_B.normal_()
    W = layer.parametrizations.weight.original
    assert update.scale == 4 and torch.equal(layer.weight, W + (update.lora_B @ update.lora_A) * 4)
    assert not torch.allclose(layer.weight, W + update.lora_B @ update.lora_A)


def test_decision_22_registered_wherever_the_weight_is():
    """On another device the document's ``nn.Parameter(...).to(device)`` is no parameter at all."""
    layer = nn.Linear(6, 4, device="meta")
    update = add_parametrization(layer)
    assert {name for name, _ in update.named_parameters()} == {"lora_A", "lora_B"}
    assert update.lora_A.is_meta and update.lora_A.is_leaf
    assert add_parametrization(nn.Linear(6, 4, dtype=torch.float64)).lora_A.dtype == torch.float64


def test_decision_23_freeze_loop():
    """The document's loop looks for "lora" in names that hold none, and freezes all twelve parameters."""
    net = NNClassifier(36, 8, 8)
    for layer in (net.fc1, net.fc2, net.fc3):
        add_parametrization(layer, 1, 1)
    for name, param in net.named_parameters():
        if "lora" not in name:
            param.requires_grad = False
    trained = [name for name, param in net.named_parameters() if param.requires_grad]
    assert len(trained) == 6 and len(list(net.parameters())) == 12
    net(torch.randn(5, 36)).sum().backward()
    assert all(p.grad is not None for p in net.parameters() if p.requires_grad)


def test_decision_24_names():
    """One spelling of each: no alias of a misspelt one."""
    assert list(inspect.signature(add_parametrization).parameters)[:3] == ["layer", "rank", "alpha"]
    assert all(callable(getattr(fastpeft, name)) for name in ("enable_lora", "disable_lora", "lora_disabled"))
    for wrong in ("LoRaParameterization", "LoRAParameterization", "LinearLayerParameterization", "EnableDesableLoRA"):
        assert not hasattr(fastpeft, wrong)
    net = nn.Sequential(nn.Linear(4, 4), LoRALinear(4, 4, rank=2), nn.Conv2d(1, 1, 3))
    add_parametrization(net[0])
    add_parametrization(net[2])
    assert disable_lora(net) == 3 and not net[1].enabled and not net[0].parametrizations.weight[0].enabled
    assert enable_lora(net) == 3


def test_decision_25_one_digit_by_a_mask():
    """The document's ``targets = 2`` overwrites every target; a mask leaves them, and trains on that digit alone."""
    data, targets = digits(100)
    kept = targets.clone()
    idx = targets == 2
    net = NNClassifier(36, 8, 8)
    for layer in (net.fc1, net.fc2, net.fc3):
        add_parametrization(layer)
    train(net, data[idx], targets[idx], 2)
    assert torch.equal(targets, kept) and idx.sum() == 10 and set(targets[idx].tolist()) == {2}


def test_decision_26_true_counts():
    """The document adds the weight twice and the bias never, 5,608,000; LoRA of rank 1 adds a quarter per cent."""
    net = NNClassifier(device="meta")
    total = sum(p.numel() for p in net.parameters())
    assert total == 2_807_010
    for layer in (net.fc1, net.fc2, net.fc3):
        add_parametrization(layer, rank=1)
    added = sum(p.numel() for p in net.parameters()) - total
    assert added == (784 + 1000) + (1000 + 2000) + (2000 + 10) == 6794
    assert round(100 * added / total, 3) == 0.242


def test_decision_27_the_digit_is_a_parameter():
    """The document's comment says 9 where its code says 2: nothing here knows a digit, and the call names the layer."""
    source = inspect.getsource(inspect.getmodule(add_parametrization))
    assert "digit" not in source and "MNIST" not in source
    weights = []
    for digit in (2, 9):
        torch.manual_seed(0)
        net, (data, targets) = NNClassifier(36, 8, 8), digits(100)
        add_parametrization(net.fc3)
        idx = targets == digit
        train(net, data[idx], targets[idx], 3)
        weights.append(net.fc3.weight)
    assert not torch.equal(*weights)


def saved_elements(module, x):
    """The sizes of what autograd keeps of one forward, parameters apart."""
    own, sizes = {p.data_ptr() for p in module.parameters()}, []

    def pack(tensor):
        if tensor.data_ptr() not in own:
            sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(x)
    return sizes


def test_decision_28_cost():
    """A parametrization keeps a merged weight for backward, and its docstring says who does not; any weight has one."""
    layer, x = nn.Linear(96, 80), torch.randn(2, 96, requires_grad=True)
    add_parametrization(layer)
    assert max(saved_elements(layer, x)) == 96 * 80
    assert max(saved_elements(LoRALinear(nn.Linear(96, 80), 1), x)) <= 2 * 96
    assert "same at a fraction of the cost" in inspect.getdoc(LoRAParametrization)
    conv, lstm = nn.Conv2d(3, 8, 3), nn.LSTM(5, 6)
    update = add_parametrization(conv, rank=2)
    assert update.lora_A.shape == (2, 27) and update.lora_B.shape == (8, 2)
    add_parametrization(lstm, name="weight_hh_l0")
    for module, given in ((conv, torch.randn(1, 3, 5, 5)), (lstm, torch.randn(4, 2, 5))):
        out = module(given)
        (out[0] if isinstance(out, tuple) else out).sum().backward()
    assert update.lora_B.grad.any() and lstm.parametrizations.weight_hh_l0[0].lora_B.grad.any()
    with parametrize.cached():
        assert layer.weight is layer.weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    layer = nn.Linear(6, 4, dtype=dtype)
    update = add_parametrization(layer, 2)
    layer(torch.randn(3, 6, dtype=dtype)).sum().backward()
    assert update.lora_A.dtype == update.lora_B.grad.dtype == dtype
