"""Tiny transformers models drawn at random, and what a prompt or a prefix does to them, written out."""

import copy

import pytest
import torch
from torch import nn

from fastpeft.nn.prompts import PrefixEncoder, PrefixTuning, PromptEmbedding, PromptEncoder, PTuningEmbedding

transformers = pytest.importorskip("transformers")

V, D, P, LAYERS, HEADS, HEAD = 40, 16, 3, 2, 4, 4
_SMALL = {"vocab_size": V, "hidden_size": D, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": 24,
              "max_position_embeddings": 48, "initializer_range": 0.4}  # fmt: skip
_DECODER = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
_QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
CONFIGS = {
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=V, n_positions=48, n_embd=D, n_layer=LAYERS, n_head=HEADS, initializer_range=0.4,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **_DECODER),
    "llama": lambda: transformers.LlamaConfig(**_SMALL, num_key_value_heads=2, **_DECODER),
    "mistral": lambda: transformers.MistralConfig(**_SMALL, num_key_value_heads=1, sliding_window=None, **_DECODER),
    "bert": lambda: transformers.BertConfig(**_SMALL, **_QUIET, num_labels=3),
    "roberta": lambda: transformers.RobertaConfig(**_SMALL, **_QUIET, num_labels=3, pad_token_id=1),
    "t5": lambda: transformers.T5Config(
        vocab_size=V, d_model=D, d_kv=HEAD, d_ff=24, num_layers=LAYERS, num_heads=HEADS, dropout_rate=0.0,
        initializer_factor=1.0, pad_token_id=0, eos_token_id=None, decoder_start_token_id=0),
}  # fmt: skip
KV_HEADS = {"llama": 2, "mistral": 1}
TASKS = {"bert": "TokenClassification", "roberta": "TokenClassification", "t5": "ConditionalGeneration"}
FAMILY = {"gpt2": "GPT2", "llama": "Llama", "mistral": "Mistral", "bert": "Bert", "roberta": "Roberta", "t5": "T5"}
DECODERS, ENCODERS = ("gpt2", "llama", "mistral"), ("bert", "roberta")
MODELS = (*DECODERS, *ENCODERS, "t5")


def model(name, task=None, **changes):
    """A model in eval mode; seeded by the test."""
    config = CONFIGS[name]()
    for key, value in changes.items():
        setattr(config, key, value)
    task = task or TASKS.get(name, "LMHeadModel" if name == "gpt2" else "ForCausalLM")
    task = task if task.startswith(("For", "LMHead", "Model", "Encoder", "Double")) else "For" + task
    return getattr(transformers, FAMILY[name] + task)(config).eval()


def prompt(kind="embedding", **options):
    makers = {"embedding": PromptEmbedding, "mlp": PromptEncoder, "lstm": PromptEncoder, "ptuning": PTuningEmbedding}
    if kind in ("mlp", "lstm"):
        options = {"encoder": kind, "hidden_size": 8, **options}
    return makers[kind](P, D, **options)


def prefix(name, kind="tuning", **options):
    heads = KV_HEADS.get(name, HEADS)
    if kind == "tuning":
        return PrefixTuning(LAYERS, heads, HEAD, P, **options)
    return PrefixEncoder(P, LAYERS, heads, HEAD, **{"projection_dim": 8 if kind == "projected" else None, **options})


def batch(name, T=6, B=2, left=0):
    """Token ids, a mask with ``left`` padding in the first row, and labels, -100 on padding and what it predicts."""
    ids = torch.randint(5, V, (B, T))
    mask = torch.ones_like(ids)
    pad = 1 if name == "roberta" else 0
    mask[0, :left], ids[0, :left] = 0, pad
    labels = torch.randint(0, 3, (B, T)) if name in ENCODERS else ids.clone()
    before = nn.functional.pad(mask, (1, 0), value=1)[:, :-1]
    return ids, mask, labels.masked_fill((mask * before) == 0, -100)


def positions(name, mask, first=0):
    """What ``generate`` makes of a mask: padding does not count. RoBERTa's begin after its padding's."""
    first += 2 if name == "roberta" else 0
    return (mask.cumsum(-1) - 1 + first).masked_fill(mask == 0, 1)


def greedy(step, ids, mask, n=5):
    """The ids and n more, of the largest logit of ``step(ids, mask)``."""
    with torch.no_grad():
        for _ in range(n):
            ids = torch.cat([ids, step(ids, mask).logits[:, -1:].argmax(-1)], 1)
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    return ids


def gradients(module, loss):
    """Those of the parameters of ``module``, which must all have one that is not zero."""
    module.zero_grad()
    loss.backward()
    found = {name: p.grad.clone() for name, p in module.named_parameters()}
    assert all(grad.any() for grad in found.values()), [name for name, grad in found.items() if not grad.any()]
    return found


def trace(model):
    """All that an insertion could leave behind."""
    hooks = {name: len(m._forward_hooks) + len(m._forward_pre_hooks) for name, m in model.named_modules()}
    grads = {name: p.requires_grad for name, p in model.named_parameters()}
    kept = {name: sorted(m.__dict__) for name, m in model.named_modules()}
    kinds = {name: type(m) for name, m in model.named_modules()}
    return hooks, grads, kept, kinds, list(model.state_dict())


def with_prompt(base, rows, ids, mask=None, labels=None):
    """The formula of a prompt: its rows [P, D] before the embeddings of a model that has none; padding does not count."""
    B, name = ids.shape[0], base.config.model_type
    encoder = base.get_encoder() if base.config.is_encoder_decoder else base
    embeddings = torch.cat([rows.expand(B, *rows.shape), encoder.get_input_embeddings()(ids)], 1)
    mask = torch.ones_like(ids) if mask is None else mask
    mask = torch.cat([mask.new_ones(B, len(rows)), mask], 1)
    if labels is not None and not base.config.is_encoder_decoder:
        labels = torch.cat([labels.new_full((B, len(rows)), -100), labels], 1)
    extra = {} if name == "t5" else {"position_ids": positions(name, mask)}
    return base(inputs_embeds=embeddings, attention_mask=mask, labels=labels, **extra)


class _Written(nn.Module):
    """An attention with a prefix, in full: keys and values of a table before the model's own."""

    def __init__(self, states, mask, causal, bias=None):
        super().__init__()
        self.states, self.mask, self.causal, self.bias = states, mask, causal, bias

    def __call__(self, module, query, key, value, attention_mask, scaling=None, position_bias=None, **_):
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        own = self.states is not None and module.is_causal == self.causal
        P = 0
        seen = torch.ones(query.shape[0], 1, query.shape[2], key.shape[2], dtype=torch.bool)
        if own:
            before = self.states[module.layer_idx]
            P = before[0].shape[-2]
            key, value = (torch.cat([a.to(b), b], -2) for a, b in zip(before, (key, value), strict=True))
            if self.causal:
                seen = seen.tril()
            if self.mask is not None:
                seen = seen & self.mask[:, None, None, :].bool()
            seen = nn.functional.pad(seen, (P, 0), value=True)
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        scores = query @ key.transpose(-1, -2) * scaling
        if own and self.bias is not None:
            scores = scores + self.bias
        elif position_bias is not None:
            scores = scores + position_bias
        scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
        return (scores.softmax(-1) @ value).transpose(1, 2), None


def with_prefix(base, states, ids, mask=None, labels=None):
    """The formula of a prefix: every self-attention of the model that is meant, written out; positions from P."""
    base = copy.deepcopy(base)
    name = base.config.model_type
    P, T = states[0][0].shape[-2], ids.shape[1]
    bias = None
    if name == "t5":
        bias = base.decoder.block[0].layer[0].SelfAttention.compute_bias(T, P + T, past_seen_tokens=P)
        mask = None
    written = _Written(states, mask, name not in ENCODERS, bias)
    transformers.AttentionInterface.register("written", written)
    whole = torch.ones_like(ids) if mask is None else mask
    extra = {} if name == "t5" else {"position_ids": positions(name, whole, P)}
    for module in base.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = "written"
    return base(input_ids=ids, labels=labels, **extra)
