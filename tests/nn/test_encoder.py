"""LoRA inside nn.TransformerEncoderLayer and nn.TransformerEncoder: eval is training at p = 0 (SPEC decision 1)."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

import fastpeft
from fastpeft import LoRALinear, LoRAMultiheadAttention, QLoRALinear, encoder_safe

D, HEADS, N, L = 16, 2, 3, 5
ALL = ("self_attn.in_proj", "self_attn.out_proj", "linear1", "linear2")


def adapt(layer, targets=ALL):
    """``layer`` with trained adapters on ``targets``, put in by hand."""
    attention = tuple(t.removeprefix("self_attn.") for t in targets if t.startswith("self_attn."))
    if attention:
        layer.self_attn = LoRAMultiheadAttention.from_attention(layer.self_attn, rank=2, dropout=0.0, targets=attention)
    for name in targets[len(attention) :]:
        setattr(layer, name, LoRALinear.from_linear(getattr(layer, name), rank=2, dropout=0.0))
    for name, parameter in layer.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, 0, 0.1)
    return layer.requires_grad_(False) if not targets else layer


def layer(**options):
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(D, HEADS, 24, **{"dropout": 0.0, "batch_first": True, **options})


def masks(batch_first=True):
    pad = torch.zeros(N, L, dtype=torch.bool)
    pad[0, 3:] = True
    causal = torch.ones(L, L, dtype=torch.bool).triu(1)
    x = torch.randn((N, L, D) if batch_first else (L, N, D))
    return x, [{}, {"pad": pad}, {"mask": causal}, {"mask": causal, "causal": True}, {"mask": causal, "pad": pad}]


def call(module, x, mask=None, pad=None, causal=False):
    if isinstance(module, nn.TransformerEncoder):
        return module(x, mask=mask, src_key_padding_mask=pad, is_causal=causal)
    return module(x, src_mask=mask, src_key_padding_mask=pad, is_causal=causal)


@pytest.mark.parametrize("targets", [ALL, ("self_attn.out_proj", "linear2"), ("linear1",)], ids=len)
@pytest.mark.parametrize("options", [{}, {"batch_first": False}, {"norm_first": True, "activation": "gelu"}], ids=str)
def test_eval_is_training(options, targets):
    module = adapt(layer(**options), targets)
    base = layer(**options).eval()
    x, given = masks(options.get("batch_first", True))
    for mask in given:
        trained = call(module.train(), x, **mask)
        with torch.no_grad():
            torch.testing.assert_close(call(module.eval(), x, **mask), trained)
            assert (trained - call(base, x, **mask)).abs().max() > 1e-3
    call(module, x).sum().backward()
    assert all(p.grad is not None for name, p in module.named_parameters() if "lora_" in name)


def test_the_fast_path_would_skip_the_adapter():
    """What the hook prevents: without it eval gives the base's output. So this file's other tests can fail."""
    module = adapt(layer(), ("linear1",)).eval()
    x, _ = masks()
    with torch.no_grad():
        ours = module(x)
        module.linear1._forward_pre_hooks.clear()
        skipped = module(x)
    assert (ours - skipped).abs().max() > 1e-3
    torch.testing.assert_close(skipped, layer().eval().requires_grad_(False)(x))


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("targets", [ALL, ("linear1", "linear2")], ids=len)
def test_encoder_with_padding(targets, safe):
    """The enclosing encoder nests a padded x in eval mode; `encoder_safe` stops it, and nested tensors are right too."""
    encoder = nn.TransformerEncoder(layer(), 2)
    for inner in encoder.layers:
        adapt(inner, targets)
    if safe:
        assert encoder_safe(encoder) == ["", "layers.0", "layers.1"] and not encoder.use_nested_tensor
        assert encoder_safe(encoder) == []
    x, given = masks()
    for mask in given:
        seen = ~mask["pad"] if "pad" in mask and not safe else slice(None)
        trained = call(encoder.train(), x, **mask)
        with torch.no_grad():
            torch.testing.assert_close(call(encoder.eval(), x, **mask)[seen], trained[seen])
    # With gradients, in eval mode: through the nested tensors where there are some.
    found = []
    for mode in (True, False):
        encoder.train(mode).zero_grad()
        (call(encoder, x, **given[1]) * ~given[1]["pad"].unsqueeze(-1)).square().sum().backward()
        found.append([p.grad for name, p in encoder.named_parameters() if "lora_" in name])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_plain_encoders_stay():
    encoder = nn.TransformerEncoder(layer(), 1)
    assert encoder_safe(encoder) == [] and encoder.use_nested_tensor
    plain = encoder.layers[0].linear1
    encoder.layers[0].linear1 = LoRALinear.from_linear(plain)
    assert encoder_safe(encoder) == ["", "layers.0"] and not encoder.use_nested_tensor
    encoder.layers[0].linear1 = plain
    assert encoder_safe(encoder) == ["", "layers.0"] and encoder.use_nested_tensor
    assert not any(module._forward_pre_hooks for module in encoder.modules())


def test_decoder_and_transformer():
    torch.manual_seed(0)
    model = nn.Transformer(D, HEADS, 1, 1, 24, dropout=0.0, batch_first=True)
    adapt(model.encoder.layers[0])
    decoder = adapt(model.decoder.layers[0])
    decoder.multihead_attn = LoRAMultiheadAttention.from_attention(decoder.multihead_attn, rank=2, dropout=0.0)
    nn.init.normal_(decoder.multihead_attn.in_proj.lora_B)
    assert encoder_safe(model) == ["encoder", "encoder.layers.0"]
    x, given = masks()
    y = torch.randn(N, 4, D)
    causal = model.generate_square_subsequent_mask(4)
    options = {"tgt_mask": causal, "tgt_is_causal": True, "src_key_padding_mask": given[1]["pad"]}
    trained = model.train()(x, y, **options)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x, y, **options), trained)


def test_hook_survives_copies_and_lets_others_run():
    module = LoRALinear(4, 4)
    x = torch.randn(2, 4)
    for twin in (
        module,
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        QLoRALinear.from_linear(nn.Linear(64, 4)),
    ):
        hooks = twin._forward_pre_hooks
        # One hook, so that torch's encoder calls the module; false, so that calling it costs what it did.
        assert len(hooks) == 1 and not hooks
        seen = []
        handle = twin.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args))
        assert hooks and len(hooks) == 2
        twin(x if twin.in_features == 4 else torch.randn(2, 64))
        handle.remove()
        assert len(seen) == 1 and not hooks
    compiled = torch.compile(nn.Sequential(module), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x))


def test_disabled_and_merged_encoders():
    module, base = adapt(layer()), layer().eval()
    x, _ = masks()
    with torch.no_grad():
        y = module.eval()(x)
        with fastpeft.lora_disabled(module):
            torch.testing.assert_close(module(x), base(x))
        module.self_attn.merge()
        module.linear1.merge()
        torch.testing.assert_close(module(x), y)


@pytest.mark.parametrize("targets", [("self_attn.out_proj",), ("linear1",)], ids=str)
def test_compiles_and_warns_nothing(targets):
    module = adapt(layer(), targets).eval()
    if targets == ("linear1",):  # without it torch.compile stops with an error of its own
        encoder_safe(module)
    x, given = masks()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        y = call(module, x, **given[1])
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, src_key_padding_mask=given[1]["pad"]), y)
