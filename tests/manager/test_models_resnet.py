"""LoRAResNet: LoRA in the convolutions of a network that is given, its batch normalisations at rest, a trained head."""

import copy
import pickle

import pytest
import torch
from torch import nn

from fastpeft import lora_disabled
from fastpeft.models import LoRAResNet
from fastpeft.nn import LoRAConv2d


class Block(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, groups=2, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        return torch.relu(self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))) + self.downsample(x))


class ResNet(nn.Module):
    def __init__(self, classes=10):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 5, 2, 2, bias=False), nn.BatchNorm2d(8)
        self.layer1, self.layer2 = Block(8, 8, 1), Block(8, 12, 2)
        self.fc = nn.Linear(12, classes)

    def forward(self, x):
        x = self.layer2(self.layer1(torch.relu(self.bn1(self.conv1(x)))))
        return self.fc(x.mean((2, 3)))


def resnet(classes=10):
    """With statistics as a trained network has them."""
    model = ResNet(classes).train()
    for _ in range(3):
        model(torch.randn(8, 3, 12, 12) + 1)
    return model.eval()


def moved(model):
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LoRAConv2d):
                module.lora_B.normal_()
    return model


def test_adapts_every_convolution():
    base = resnet()
    plain, x = copy.deepcopy(base), torch.randn(2, 3, 12, 12)
    model = LoRAResNet(10, model=base)
    assert model.resnet is base and sum(isinstance(m, LoRAConv2d) for m in base.modules()) == 7
    # As many classes: the head that it has, and the identity before training.
    torch.testing.assert_close(model(x), plain(x))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name or name.startswith("resnet.fc.") for name in trained) and len(trained) == 14 + 2
    assert all(torch.equal(dict(base.named_parameters())[name], p) for name, p in plain.named_parameters())
    conv = base.layer1.conv1
    assert (conv.rank, conv.scaling, conv.init, conv.dropout_probability) == (4, 0.01, "randn", 0.0)
    assert conv.lora_A.shape == (4, 72) and conv.lora_B.shape == (8, 4)
    y = moved(model)(x)
    assert not torch.allclose(y, plain(x))
    with lora_disabled(model):
        assert torch.equal(model(x), plain(x))
    torch.testing.assert_close(model.merge()(x), y, rtol=1e-4, atol=1e-4)
    assert torch.equal(model.unmerge()(x), y)


def test_another_number_of_classes():
    model = LoRAResNet(3, 2, resnet(), alpha=4)
    assert model(torch.randn(2, 3, 12, 12)).shape == (2, 3) and model.resnet.fc.out_features == 3
    assert model.resnet.fc.weight.requires_grad and model.resnet.conv1.scaling == 2.0


def test_training_leaves_statistics_and_learns():
    base = resnet()
    frozen = {name: value.clone() for name, value in base.state_dict().items() if not name.startswith("fc.")}
    model = LoRAResNet(2, model=base, alpha=16).train()
    assert model.training and model.resnet.layer1.training and not model.resnet.bn1.training
    x = torch.randn(16, 3, 12, 12)
    x[::2, :, ::2] += 1.5
    labels = torch.arange(16) % 2
    optimizer = torch.optim.AdamW(model.get_trainable_parameters(), 2e-2)
    for _ in range(30):
        logits = model(x)
        loss = nn.functional.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (logits.argmax(-1) == labels).all()
    state = base.state_dict()
    assert all(torch.equal(state[name], value) for name, value in frozen.items())
    torch.testing.assert_close(model.eval()(x), model.train()(x))


def test_state():
    model, twin, x = LoRAResNet(3, model=resnet()), LoRAResNet(3, model=resnet()), torch.randn(2, 3, 12, 12)
    rest = {k: v for k, v in moved(model).state_dict().items() if k not in model.efficient_state_dict()}
    twin.load_state_dict(rest, strict=False)
    twin.load_efficient_state_dict(model.efficient_state_dict())
    assert torch.equal(twin(x), model(x))
    for same in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(same(x), model(x))


def test_norms_that_follow():
    model = LoRAResNet(3, model=resnet(), freeze_norm=False).train()
    before = model.resnet.bn1.running_mean.clone()
    model(torch.randn(4, 3, 12, 12))
    assert model.resnet.bn1.training and not torch.equal(model.resnet.bn1.running_mean, before)
    assert not model.resnet.bn1.weight.requires_grad
    state = model.efficient_state_dict()
    assert "resnet.bn1.running_mean" in state
    twin = LoRAResNet(3, model=resnet(), freeze_norm=False)
    twin.load_efficient_state_dict(state)
    assert torch.equal(twin.resnet.layer2.bn1.num_batches_tracked, model.resnet.layer2.bn1.num_batches_tracked)


def test_precision_and_compile():
    model, x = moved(LoRAResNet(3, model=resnet())), torch.randn(2, 3, 12, 12)
    y = model(x)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), y, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(x).float(), y, rtol=0.1, atol=0.1)
    half = moved(LoRAResNet(3, model=resnet().bfloat16()))
    half(x.bfloat16()).sum().backward()
    assert half.resnet.conv1.lora_A.grad.dtype == torch.float32


def test_of_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic")
    base = transformers.ResNetForImageClassification(config).eval()
    model = LoRAResNet(5, model=base)
    assert model(pixel_values=torch.randn(2, 3, 32, 32)).shape == (2, 5)
    assert base.classifier[1].out_features == 5


def test_bad_input():
    for call, error, message in (
        (lambda: LoRAResNet(3, model="resnet50"), TypeError, "LoRAResNet: model must be an nn.Module or None, got str"),
        (lambda: LoRAResNet(0, model=resnet()), ValueError, "num_classes must be at least 1, got 0"),
        (lambda: LoRAResNet(3, model=nn.Linear(2, 2)), ValueError, "model must have an nn.Conv2d, got Linear"),
        (lambda: LoRAResNet(3, model=nn.Conv2d(2, 2, 1)), ValueError, "model must have an nn.Linear as its head"),
        (lambda: LoRAResNet(3, model=resnet(), lora_rank=2), TypeError, "did you mean rank"),
    ):
        with pytest.raises(error, match=message):
            call()
    base = resnet()
    base.layer2.conv2.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="have no hooks"):
        LoRAResNet(10, model=base)
    assert all(p.requires_grad for p in base.parameters())
    assert not any(isinstance(m, LoRAConv2d) for m in base.modules())


def test_resnet50_of_torchvision():
    pytest.importorskip(
        "torchvision.models", exc_type=(ImportError, RuntimeError), reason="no torchvision that fits this torch"
    )
    model = LoRAResNet(3)
    assert sum(isinstance(m, LoRAConv2d) for m in model.modules()) == 53 and model.resnet.fc.out_features == 3
