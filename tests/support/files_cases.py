"""Models that the tests of files share with processes that have no fastpeft: everything here is torch and transformers."""

import torch
from torch import nn

from manager_cases import Small

V = 40
_SIZES = {"vocab_size": V, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24,
          "max_position_embeddings": 48, "initializer_range": 0.4}  # fmt: skip
_DECODER = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}


class Convolutions(nn.Module):
    """Every dimension, strides and padding, a kernel of 1, and a linear head."""

    def __init__(self):
        super().__init__()
        self.one = nn.Conv1d(3, 4, 3, padding=1)
        self.two = nn.Conv2d(4, 6, (3, 2), stride=2, padding=(1, 0))
        self.point = nn.Conv2d(6, 5, 1)
        self.three = nn.Conv3d(5, 4, 2)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = self.one(x).unflatten(-1, (8, 8))
        x = torch.relu(self.point(torch.relu(self.two(x))))
        x = self.three(x.unsqueeze(2).expand(-1, -1, 3, -1, -1))
        return self.head(x.flatten(2).mean(-1))


class Nested(nn.Module):
    """A layer whose name is also the end of another one's, with characters that expressions know."""

    def __init__(self):
        super().__init__()
        self.a, self.x = nn.Linear(8, 8), nn.ModuleDict({"a": nn.Linear(8, 8), "b+": nn.Linear(8, 8)})

    def forward(self, x):
        return self.x["b+"](torch.relu(self.x["a"](torch.relu(self.a(x)))))


def _transformers(name):
    import transformers as t

    if name == "gpt2":
        sizes = {"vocab_size": V, "n_positions": 48, "n_embd": 16, "n_layer": 2, "n_head": 4, "initializer_range": 0.4}
        return t.GPT2LMHeadModel(t.GPT2Config(**sizes, **_DECODER))
    if name.startswith("llama"):
        # bitsandbytes' CPU kernels read blocks of 64 as if none went over the end of a row.
        sizes = _SIZES if name == "llama" else {**_SIZES, "hidden_size": 64, "initializer_range": 0.1}
        return t.LlamaForCausalLM(t.LlamaConfig(**sizes, num_key_value_heads=2, **_DECODER))
    if name == "bert":
        return t.BertForSequenceClassification(t.BertConfig(**_SIZES, num_labels=3))
    return t.T5ForConditionalGeneration(
        t.T5Config(vocab_size=V, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, initializer_factor=1.0,
                   pad_token_id=0, eos_token_id=None, decoder_start_token_id=0))  # fmt: skip


def build(name, dtype=torch.float32):
    """The same weights in every process."""
    torch.manual_seed(7)
    made = {"small": Small, "convolutions": Convolutions, "nested": Nested}
    model = (made[name]() if name in made else _transformers(name)).to(dtype).eval()
    if name == "llama4bit":
        import bitsandbytes as bnb

        for module in list(model.modules()):
            for key in ("q_proj", "v_proj"):
                old = module._modules.get(key)
                if old is not None:
                    new = bnb.nn.Linear4bit(
                        old.in_features, old.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4"
                    )
                    new.weight = bnb.nn.Params4bit(
                        old.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=False
                    )
                    module._modules[key] = new.to("cpu")
    return model


def inputs(name):
    generator = torch.Generator().manual_seed(3)
    if name in ("small", "nested"):
        return {"x": torch.randn(4, 8, generator=generator)}
    if name == "convolutions":
        return {"x": torch.randn(2, 3, 64, generator=generator)}
    ids = torch.randint(2, V, (2, 6), generator=generator)
    return (
        {"input_ids": ids, "labels": ids}
        if name == "t5"
        else {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    )


@torch.no_grad()
def output(model, name):
    # In eval mode bitsandbytes repacks a weight on a CPU, where it takes only some sizes; there is no dropout to hide.
    out = model.train(name == "llama4bit")(**inputs(name))
    return out if isinstance(out, torch.Tensor) else out.logits
