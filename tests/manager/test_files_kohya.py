"""kohya's and LyCORIS' files, made and read by the package lycoris; and what they may not hold."""

import copy

import pytest
import torch
from torch import nn

from fastpeft import EfficientFineTuningManager, load_adapter, save_adapter
from files_cases import build, inputs
from manager_cases import Small, assert_same, picture, train

pytest.importorskip("safetensors")
from safetensors import safe_open
from safetensors.torch import load_file, save_file


@pytest.fixture(scope="module")
def lycoris():
    return pytest.importorskip("lycoris", reason="pip install lycoris-lora makes the files")


def theirs(lycoris, file, **options):
    """A file of LyCORIS' over the convolutions, and what their network gives."""
    torch.manual_seed(1)
    model = build("convolutions")
    network = lycoris.create_lycoris(model, 1.0, linear_dim=3, linear_alpha=2, **options)
    network.apply_to()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(0, 0.3)
        want = model(**inputs("convolutions"))
    network.save_weights(str(file), torch.float32, {})
    return want


@pytest.mark.parametrize("tucker", [False, True])
def test_their_file_in_ours_and_back(tucker, lycoris, tmp_path):
    want = theirs(lycoris, tmp_path / "t.safetensors", conv_dim=4, conv_alpha=1, use_tucker=tucker)
    found = load_file(tmp_path / "t.safetensors")
    assert any("lora_mid" in key for key in found) == tucker and len(found) >= 15
    manager = load_adapter(build("convolutions"), tmp_path / "t.safetensors")
    with torch.no_grad():
        got = manager.model.eval()(**inputs("convolutions"))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))
    # ours → file → theirs
    save_adapter(manager, tmp_path / "o.safetensors", "kohya", tucker=tucker)
    again = load_file(tmp_path / "o.safetensors")
    assert again.keys() == found.keys()
    assert all(again[key].shape == found[key].shape for key in found)
    if not tucker:
        assert all(torch.equal(again[key], found[key]) for key in found)
    model = build("convolutions")
    network, _ = lycoris.create_lycoris_from_weights(1.0, str(tmp_path / "o.safetensors"), model)
    network.apply_to()
    with torch.no_grad():
        back = model(**inputs("convolutions"))
    torch.testing.assert_close(back, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


def test_rank_stabilised(lycoris, tmp_path):
    want = theirs(lycoris, tmp_path / "t.safetensors", conv_dim=4, rs_lora=True)
    manager = load_adapter(build("convolutions"), tmp_path / "t.safetensors")
    with torch.no_grad():
        got = manager.model.eval()(**inputs("convolutions"))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


@pytest.mark.parametrize("algo", ["loha", "lokr", "full", "diag-oft", "ia3", "dora"])
def test_other_methods_are_refused(algo, lycoris, tmp_path):
    extra = {"dora_wd": True} if algo == "dora" else {"algo": algo}
    theirs(lycoris, tmp_path / "t.safetensors", **extra)
    model = build("convolutions")
    before = picture(model)
    with pytest.raises(ValueError, match=r"lycoris_.* in .*t.safetensors must be one of lora_down.weight"):
        load_adapter(model, tmp_path / "t.safetensors", format="kohya")
    assert_same(before, picture(model))


def ours(**options):
    return train(EfficientFineTuningManager(Small()).apply_lora(["a", "b"], rank=2, **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip(dtype, tmp_path):
    manager, file = ours(alpha=3), tmp_path / "a.safetensors"
    save_adapter(manager, file, "kohya", prefix="lora_te", dtype=dtype)
    found = load_file(file)
    assert sorted(found) == [
        f"lora_te_body_{m}.{k}" for m in "ab" for k in ("alpha", "lora_down.weight", "lora_up.weight")
    ]
    assert found["lora_te_body_a.alpha"] == 3 and found["lora_te_body_a.lora_up.weight"].dtype == dtype
    with safe_open(str(file), "pt") as opened:
        assert opened.metadata()["ss_network_dim"] == "2" and opened.metadata()["ss_network_alpha"] == "3"
    twin = load_adapter(Small(), file)
    layer, other = manager.model.body["a"], twin.model.body["a"]
    assert torch.equal(layer.lora_A.to(dtype).float(), other.lora_A) and other.scaling == layer.scaling == 1.5
    save_adapter(twin, tmp_path / "b.safetensors", "kohya", prefix="lora_te", dtype=dtype)
    again = load_file(tmp_path / "b.safetensors")
    assert all(torch.equal(found[key], again[key]) for key in found)


@pytest.mark.parametrize("form", ["svd", "scores"])
def test_gains_are_in_the_factors(form, tmp_path):
    manager = train(EfficientFineTuningManager(Small()).apply_adalora(["a", "b"], rank=3, form=form))
    save_adapter(manager, tmp_path / "a.safetensors", "kohya")
    save_adapter(manager, tmp_path / "a.pt", "loralib")
    x = torch.randn(4, 8)
    for file, options in (("a.safetensors", {}), ("a.pt", {"alpha": 16})):
        model = Small()
        model.load_state_dict(
            {key: value for key, value in manager.model.state_dict().items() if key in model.state_dict()}
        )
        twin = load_adapter(model, tmp_path / file, **options)
        torch.testing.assert_close(twin.model.eval()(x), manager.model.eval()(x))


def test_files_of_several_models(tmp_path):
    file, manager = tmp_path / "a.safetensors", ours()
    save_adapter(manager, file, "kohya", prefix="lora_te1")
    one = load_file(file)
    save_file({**one, **{key.replace("lora_te1", "lora_unet"): value * 2 for key, value in one.items()}}, file)
    with pytest.raises(ValueError, match=r"prefix must be given for a file .* got \['lora_te1', 'lora_unet'\]"):
        load_adapter(Small(), file)
    twin = load_adapter(Small(), file, prefix="lora_te1")
    assert torch.equal(twin.model.body["a"].lora_A, manager.model.body["a"].lora_A)
    assert torch.equal(
        load_adapter(Small(), file, prefix="lora_unet").model.body["a"].lora_A, 2 * manager.model.body["a"].lora_A
    )
    with pytest.raises(ValueError, match=r"prefix must be one of those in .*: lora_te1, lora_unet, got 'x'"):
        load_adapter(Small(), file, prefix="x")


def test_pointwise_convolutions_are_linear_layers(tmp_path):
    """One tool's linear projection is another's convolution of 1 x 1."""
    file = tmp_path / "a.safetensors"
    save_adapter(ours(), file, "kohya")
    found = load_file(file)
    wide = {key: value.view(*value.shape, 1, 1) if value.dim() == 2 else value for key, value in found.items()}
    save_file(wide, file)
    twin = load_adapter(Small(), file)
    assert torch.equal(twin.model.body["a"].lora_A, found["lycoris_body_a.lora_down.weight"])
    body = nn.ModuleDict({"body": nn.ModuleDict({"a": nn.Conv2d(8, 8, 1), "b": nn.Conv2d(8, 12, 1)})})
    save_file(found, file)
    assert torch.equal(load_adapter(body, file).model["body"]["a"].lora_A, twin.model.body["a"].lora_A)


def test_scaling_without_alpha_is_one(tmp_path):
    file = tmp_path / "a.safetensors"
    save_adapter(ours(), file, "kohya")
    found = load_file(file)
    del found["lycoris_body_a.alpha"]
    found["lycoris_body_b.alpha"] = torch.tensor(0)
    save_file(found, file)
    twin = load_adapter(Small(), file)
    assert twin.model.body["a"].scaling == twin.model.body["b"].scaling == 1.0


D, U, M = ("lycoris_body_a.lora_" + each for each in ("down.weight", "up.weight", "mid.weight"))
WRONG = {
    "half": (lambda t: {k: v for k, v in t.items() if k != U}, "lora_down.weight in .* must come with lora_up.weight"),
    "module": (lambda t: {k.replace("_a.", "_c."): v for k, v in t.items()}, "lycoris_body_c in .* must name one module of the model, got none"),
    "shape": (lambda t: t | {D: torch.ones(2, 9)}, r"lora_down.weight in .* must have shape \[r, 8\], by the model's layer"),
    "alpha": (lambda t: t | {"lycoris_body_a.alpha": torch.ones(2)}, "alpha in .* must be one finite number"),
    "nan": (lambda t: t | {"lycoris_body_a.alpha": torch.tensor(torch.nan)}, "alpha in .* must be one finite number"),
    "inf": (lambda t: t | {D: torch.full((2, 8), torch.inf)}, "lora_down.weight in .* must be finite"),
    "mid": (lambda t: t | {M: torch.ones(2, 3, 3)}, "lora_mid.weight in .* must have shape .2, 2, .kernel., got"),
    "no rank": (lambda t: t | {D: torch.ones(0, 8), U: torch.ones(8, 0)}, r"lora_up.weight in .* must have shape \[out, r\]"),
    "mid dtype": (lambda t: t | {M: torch.ones(2, 2, 3, dtype=torch.int32)}, "lora_mid.weight in .* must be float32"),
    "strange": (lambda t: t | {"what.weight": torch.ones(1)}, "what.weight in .* must be one of lora_down.weight"),
    "prefix": (lambda t: t | {"what.alpha": torch.ones(1)}, "prefix must be given for a file with modules of several models"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_refused(what, tmp_path):
    change, text = WRONG[what]
    file = tmp_path / "a.safetensors"
    save_adapter(ours(), file, "kohya")
    save_file(change(load_file(file)), file)
    model = Small()
    before = picture(model)
    with pytest.raises((ValueError, TypeError), match=text):
        load_adapter(model, file, format="kohya")
    assert_same(before, picture(model))


def test_what_has_no_place_in_the_format(tmp_path):
    alike = nn.ModuleDict({"a_b": nn.Linear(4, 4), "a": nn.ModuleDict({"b": nn.Linear(4, 4)})})
    wide = EfficientFineTuningManager(nn.ModuleDict({"c": nn.Conv2d(8, 4, 3)})).apply_lora("c", rank=2)
    for source, options, text in (
        (ours(bias=True), {}, "bias of 'body.a' must be None for kohya's format"),
        (ours(modules_to_save="head"), {}, "modules_to_save must be empty for kohya's format"),
        (
            EfficientFineTuningManager(Small()).apply_prompt_tuning(2, token_dim=8),
            {},
            "method must be LoRA for kohya's format, got prompt_tuning",
        ),
        (EfficientFineTuningManager(alike).apply_lora(rank=1), {}, "must be written otherwise than"),
        (
            wide,
            {"tucker": True},
            "the convolution 'c' must have at most 2 independent input channels in lora_A for tucker=True",
        ),
        (ours(), {"prefix": "a.b"}, "prefix must be a name without dots"),
    ):
        with pytest.raises(ValueError, match=text):
            save_adapter(source, tmp_path / "a.safetensors", "kohya", **options)
    with pytest.raises(ValueError, match=r"path must end in \.safetensors"):
        save_adapter(ours(), tmp_path / "a.pt", "kohya")
    assert list(tmp_path.iterdir()) == []
    twin = copy.deepcopy(wide.model)
    with torch.no_grad():
        twin["c"].lora_A.view(2, 8, 3, 3)[:, 2:] = 0.0  # two channels: now it has a Tucker form
        twin["c"].lora_B.normal_()
    save_adapter(twin, tmp_path / "a.safetensors", "kohya", tucker=True)
    back = load_adapter(nn.ModuleDict({"c": nn.Conv2d(8, 4, 3)}), tmp_path / "a.safetensors")
    torch.testing.assert_close(back.model["c"].lora_A, twin["c"].lora_A)
