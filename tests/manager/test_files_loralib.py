"""loralib's state dicts, made and read by the package loralib."""

import pytest
import torch
from torch import nn

from fastpeft import EfficientFineTuningManager, load_adapter, save_adapter
from manager_cases import Small, assert_same, picture, train


@pytest.fixture(scope="module")
def lora():
    return pytest.importorskip("loralib", reason="pip install loralib makes the files")


class Layers(nn.Module):
    """A linear layer, a fused projection to q, k and v, and a convolution, each made by ``make``."""

    def __init__(self, linear, merged, conv):
        super().__init__()
        self.first, self.qkv, self.last, self.conv = linear(8, 8), merged(8, 12), merged(12, 8), conv(2, 6, 3)

    def forward(self, x):
        x = self.last(torch.relu(self.qkv(torch.relu(self.first(x)))))
        # loralib adds a convolution's update in training mode too; its class forwards to the bare weights' layer
        return self.conv(x.view(-1, 2, 2, 2).repeat(1, 1, 2, 2))


def plain():
    return Layers(nn.Linear, nn.Linear, nn.Conv2d)


@torch.no_grad()
def theirs(lora, alpha):
    """Their layers on the weights of ours, with values in the factors."""
    torch.manual_seed(0)
    flags = iter([[True, False, True], [True, True]])
    made = Layers(
        lambda k, n: lora.Linear(k, n, r=2, lora_alpha=alpha, lora_dropout=0.0),
        lambda k, n: lora.MergedLinear(k, n, r=2, lora_alpha=alpha, enable_lora=next(flags)),
        lambda c, n, k: lora.Conv2d(c, n, k, r=2, lora_alpha=alpha),
    )
    for name, parameter in made.named_parameters():
        if "lora_" in name:
            parameter.normal_(0, 0.3)
    base = plain()
    base.load_state_dict(
        {key.replace("conv.conv", "conv"): v for key, v in made.state_dict().items() if "lora_" not in key}
    )
    return made, base.eval()


def test_their_file_in_ours(lora, tmp_path):
    x, file = torch.randn(3, 8), tmp_path / "a.pt"
    made, base = theirs(lora, alpha=3)
    bare, want = base(x), made(x)  # theirs in training mode: eval would merge into the weights
    state = lora.lora_state_dict(made)
    torch.save(state, file)
    # the layers' flags are not in the file, and differ
    with pytest.raises(ValueError, match=r"lora_B in .* must have 12 rows, by the model's layer"):
        load_adapter(base, file, alpha=3)
    torch.save({key: value for key, value in state.items() if not key.startswith("last")}, file)
    manager = load_adapter(base, file, "one", alpha=3, enable_lora=[True, False, True])
    torch.save({key: value for key, value in state.items() if key.startswith("last")}, file)
    load_adapter(manager, file, "two", alpha=3)
    assert (bare - want).abs().max() > 0.1
    torch.testing.assert_close(manager.model.eval()(x), want, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="enable_lora must say which parts of the output are adapted, 2 of them"):
        load_adapter(plain(), file, enable_lora=[True, False])


@torch.no_grad()
def test_our_file_in_theirs_and_back(lora, tmp_path):
    x, file = torch.randn(4, 8), tmp_path / "a.pt"
    manager = EfficientFineTuningManager(Small()).apply_lora(["a", "b"], rank=2, alpha=3, modules_to_save="head")
    train(manager)
    want = manager.model.eval()(x)
    for alpha in (None, 8):
        save_adapter(manager, file, "loralib", **({} if alpha is None else {"alpha": alpha}))
        made = Small()
        for name in ("a", "b"):
            old = made.body[name]
            made.body[name] = lora.Linear(old.in_features, old.out_features, r=2, lora_alpha=alpha or 3)
        base = {key: value for key, value in manager.model.state_dict().items() if "lora_" not in key}
        made.load_state_dict(base, strict=False)
        missing, unknown = made.load_state_dict(torch.load(file), strict=False)
        assert unknown == [] and not any("lora_" in key or "head" in key for key in missing)
        torch.testing.assert_close(made.train()(x), want, rtol=1e-5, atol=1e-5)
        # theirs, with the head, back in ours
        torch.save({**lora.lora_state_dict(made), **made.head.state_dict(prefix="head.")}, tmp_path / "t.pt")
        model = Small()
        model.load_state_dict(base)
        twin = load_adapter(model, tmp_path / "t.pt", alpha=alpha or 3)
        torch.testing.assert_close(twin.model.eval()(x), want, rtol=1e-5, atol=1e-5)
        assert list(twin.saved_modules) == ["head"]
        save_adapter(twin, tmp_path / "b.pt", "loralib")
        one, other = torch.load(file), torch.load(tmp_path / "b.pt")
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    with pytest.raises(ValueError, match="alpha must be other than 0, got 0"):
        save_adapter(manager, file, "loralib", alpha=0)


def test_default_alpha_is_theirs(tmp_path):
    torch.save({"body.a.lora_A": torch.ones(4, 8), "body.a.lora_B": torch.ones(8, 4)}, tmp_path / "a.pt")
    assert load_adapter(Small(), tmp_path / "a.pt").model.body["a"].scaling == 0.25


A, B = "body.a.lora_A", "body.a.lora_B"
SOUND = {A: torch.ones(2, 8), B: torch.ones(8, 2)}
WRONG = {
    "half": ({A: torch.ones(2, 8)}, "body.a.lora_A in .* must come with lora_B"),
    "other half": ({B: torch.ones(8, 2), "body.b.lora_A": torch.ones(2, 8), "body.b.lora_B": torch.ones(12, 2)}, "must be lora_A or lora_B, in pairs"),
    "none": ({"head.weight": torch.ones(3, 12)}, r"a.pt must hold tensors <module>.lora_A"),
    "module": ({"x.lora_A": torch.ones(2, 8), "x.lora_B": torch.ones(8, 2)}, "x.lora_A in .* must name a module of the model"),
    "rank": ({A: torch.ones(3, 8), B: torch.ones(8, 2)}, "lora_A in .* must have a multiple of 2 rows"),
    "inputs": ({A: torch.ones(2, 9), B: torch.ones(8, 2)}, r"lora_A in .* must have shape \[r, 8\], by the model's layer"),
    "bias": (SOUND | {"body.a.bias": torch.ones(8)}, "must hold no bias of a layer that the model has already"),
    "head": (SOUND | {"head.weight": torch.ones(3, 12)}, "the file's 'head' must hold all tensors of the module"),
    "nan": (SOUND | {A: torch.full((2, 8), torch.nan)}, "lora_A in .* must be finite"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_refused(what, tmp_path):
    tensors, text = WRONG[what]
    torch.save(tensors, tmp_path / "a.pt")
    model = Small()
    before = picture(model)
    with pytest.raises(ValueError, match=text):
        load_adapter(model, tmp_path / "a.pt")
    assert_same(before, picture(model))


def test_other_convolutions_and_embeddings(tmp_path):
    model = nn.ModuleDict({"c": nn.Conv1d(2, 4, 3), "e": nn.Embedding(8, 4)})
    torch.save({"c.lora_A": torch.ones(6, 6), "c.lora_B": torch.ones(12, 6)}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"the convolution of c.lora_A in .* must have one group, two dimensions"):
        load_adapter(model, tmp_path / "a.pt")
    torch.save({"e.lora_A": torch.ones(2, 8), "e.lora_B": torch.ones(4, 2)}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"e.lora_A in .* must name a linear layer or a convolution, got Embedding"):
        load_adapter(model, tmp_path / "a.pt")


def test_what_has_no_place_in_the_format(tmp_path):
    differing = EfficientFineTuningManager(Small()).apply_lora("a", rank=2, alpha=3)
    conv = EfficientFineTuningManager(nn.ModuleDict({"c": nn.Conv2d(2, 4, 3)})).apply_lora("c")
    for source, text in (
        (
            EfficientFineTuningManager(Small()).apply_lora("a", bias=True),
            "bias of 'body.a' must be None for loralib's format",
        ),
        (conv, "module 'c' must be a linear layer for loralib's format"),
        (
            EfficientFineTuningManager(Small()).apply_prompt_tuning(2, token_dim=8),
            "method must be LoRA for loralib's format, got prompt_tuning",
        ),
    ):
        with pytest.raises(ValueError, match=text):
            save_adapter(source, tmp_path / "a.pt", "loralib")
    with pytest.raises(ValueError, match=r"path must end in \.pt or \.pth or \.bin"):
        save_adapter(differing, tmp_path / "a.safetensors", "loralib")
    assert list(tmp_path.iterdir()) == []
