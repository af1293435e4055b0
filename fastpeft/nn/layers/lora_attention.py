"""LoRAMultiheadAttention: nn.MultiheadAttention with LoRA on its projections."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fastpeft.nn._called import KEY, called
from fastpeft.nn.config import Config
from fastpeft.nn.layers._construct import called_out_proj
from fastpeft.nn.layers._parts import LoRAPart, Parts, Site, adopt
from fastpeft.nn.layers.lora_linear import LoRALinear
from fastpeft.nn.merge import Mergeable
from fastpeft.ops import _checks, lora_linear

_PACKED = ("in_proj", "out_proj")
_APART = ("q_proj", "k_proj", "v_proj", "out_proj")


class LoRAMultiheadAttention(Parts, nn.MultiheadAttention):
    """nn.MultiheadAttention whose projections are x Wᵀ + b + scaling · (dropout(x) Aᵀ Bᵀ + lora_bias)

    Hu et al. 2021, arXiv:2106.09685, eq. 3, for each projection

    LoRAMultiheadAttention(original_layer, rank=8, alpha=16, dropout_probability=0.1, bias=False)    layout "out_in"
        adapts an nn.MultiheadAttention: its Parameters become this module's own and are frozen.
    LoRAMultiheadAttention(embed_dim, num_heads, rank=4, dropout=0.0, bias=True, ...)                layout "in_out"
        makes a new frozen one first; torch's options by keyword, with torch's meaning.

    targets    of "in_proj" (the projections of query, key and value) and "out_proj"; where kdim or vdim differ from
               embed_dim also any of "q_proj", "k_proj", "v_proj", which "in_proj" names together
    lora_bias, lora_dropout    LoRA's own, where ``bias`` and ``dropout`` are torch's; ``dropout`` of the module stays
               that of the attention weights
    rank, alpha, layout, scaling, use_rslora, init, backend, adapter_dtype, freeze_base    as in LoRALinear
    Input, output    as nn.MultiheadAttention in every calling form, nested tensors in self-attention too. No weight is
               merged in a call. Bit-identical to torch's while disabled or merged.
    Cost       self-attention of one x: one lora_linear for q, k and v; key is value: two; else three
    State dict the keys of nn.MultiheadAttention, whose checkpoints load with strict=False; in_proj.lora_A [r, E],
               in_proj.lora_B [3E, r], or q_proj.… apart; out_proj.lora_A, out_proj.lora_B. It is always that of the
               unmerged module.
    Raises     TypeError: original_layer is no plain nn.MultiheadAttention, a type, or an unknown option.
               ValueError: a range, an unknown target, or a layer with hooks; nothing has been changed then.
               In a call: what torch raises for shapes and masks.
    """

    TORCH = nn.MultiheadAttention
    SIZES = ("embed_dim", "num_heads")
    NAMES = (
        "dropout", "bias", "add_bias_kv", "add_zero_attn", "kdim", "vdim", "batch_first", "device", "dtype"
    )  # fmt: skip
    OWN = ("targets",)

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        # As on every LoRA module; found before the modules inside, whose hook dicts torch.compile cannot count.
        self._forward_pre_hooks[KEY] = called

    @classmethod
    def from_attention(
        cls,
        attention: nn.MultiheadAttention,
        rank: int | None = None,
        alpha: float | None = None,
        dropout: float | None = None,
        **options: Any,
    ) -> LoRAMultiheadAttention:
        """Adapt ``attention``: rank 16, alpha 32 (unless ``scaling`` is given), dropout 0.05, the class's options."""
        return cls._adapting(attention, rank, alpha, dropout, options)

    @classmethod
    def _sites(cls, layer: Any, targets: Any = _PACKED) -> dict[str, Site]:
        op, names = cls.__name__, (targets,) if isinstance(targets, str) else tuple(targets)
        E, apart = layer.embed_dim, {}
        sites = {"out_proj": Site("out_proj.weight", "out_proj.bias")}
        if layer._qkv_same_embed_dim:
            sites = {"in_proj": Site("in_proj_weight", "in_proj_bias"), **sites}
        else:
            for i, name in enumerate(("q_proj", "k_proj", "v_proj")):
                apart[name] = Site(f"{name}_weight", "in_proj_bias", slice(i * E, (i + 1) * E))
            sites = {**apart, **sites}
        known = tuple(sites) if not apart else ("in_proj", *sites)
        _checks.require(len(names) > 0, op, "targets", f"be some of {', '.join(known)}", "none")
        for name in names:
            _checks.one_of(op, "targets", name, known)
        if apart and "in_proj" in names:
            names += tuple(apart)
        return {name: site for name, site in sites.items() if name in names}

    def _part(self, name: str, site: Site, config: Config, dtype: torch.dtype) -> Mergeable:
        if name != "out_proj":
            return LoRAPart(self, site, config, dtype)
        options = {key: getattr(config, key) for key in ("rank", "use_rslora", "init", "dropout", "layout", "bias")}
        options |= {"alpha": config.alpha} if config.alpha is not None else {"scaling": config.scaling}
        plain = called_out_proj(self.out_proj)
        return LoRALinear(plain, backend=config.backend, adapter_dtype=dtype, freeze_base=False, **options)

    def _as_torchs(self) -> bool:
        """Whether the weights alone give the output: no update acts, and out_proj is a plain product."""
        out, parts = self.out_proj, self.parts().values()
        plain = isinstance(out, (nn.Linear, LoRALinear))
        return plain and not any(part.enabled and not part.merged for part in parts)

    def to_attention(self) -> nn.MultiheadAttention:
        """A new nn.MultiheadAttention that computes what this one does in eval mode, with its own weights."""
        plain = self._to_torch("to_attention")
        if "out_proj" not in plain._modules:
            out = self.out_proj
            assert isinstance(out, LoRALinear)
            plain.out_proj = adopt(
                NonDynamicallyQuantizableLinear.__new__(NonDynamicallyQuantizableLinear), out.to_linear()
            )
        return plain

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self._as_torchs():
            return nn.MultiheadAttention.forward(
                self, query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        for name, x in (("query", query), ("key", key), ("value", value)):
            _checks.tensor(type(self).__name__, name, x)
        if query.is_nested or key.is_nested or value.is_nested:
            return self._nested(query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights)
        torchs: Any = F
        batched = torchs._mha_shape_check(query, key, value, key_padding_mask, attn_mask, self.num_heads)
        q, k, v = self._project(query, key, value)  # [N, heads, L | S, head_dim]
        fits = k.shape == v.shape and q.shape[0] == k.shape[0]
        _checks.require(
            fits, type(self).__name__, "key", "fit query and value", [list(x.shape) for x in (query, key, value)]
        )
        mask, causal = self._mask(q, k, key_padding_mask, attn_mask, need_weights, is_causal)
        k, v, mask = self._extended(k, v, mask)
        p = self.dropout if self.training else 0.0
        weights: torch.Tensor | None = None
        if need_weights:
            scores = q * self.head_dim**-0.5 @ k.transpose(-2, -1)
            weights = torch.softmax(scores if mask is None else scores + mask, -1)
            weights = F.dropout(weights, p) if p else weights
            y = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask, p, causal)
        first = self.batch_first or not batched
        y = self.out_proj(y.permute((0, 2, 1, 3) if first else (2, 0, 1, 3)).flatten(2))
        if not batched:
            y, weights = y.squeeze(0), None if weights is None else weights.squeeze(0)
        return y, weights

    def _project(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> list[torch.Tensor]:
        """q, k, v as views [N, heads, L | S, head_dim] of one product for each distinct input."""
        if not self._qkv_same_embed_dim:
            biases: Any = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
            found = []
            for x, name, bias in zip((query, key, value), "qkv", biases, strict=True):
                weight, part = getattr(self, f"{name}_proj_weight"), self._modules.get(f"{name}_proj")
                y = part.product(x, weight, bias) if isinstance(part, LoRAPart) else F.linear(x, weight, bias)
                found += self._heads(y, 1)
            return found
        if query is key and key is value:
            return self._heads(self._packed(query, 0, 3), 3)
        q = self._heads(self._packed(query, 0, 1), 1)
        if key is value:
            return q + self._heads(self._packed(key, 1, 2), 2)
        return q + self._heads(self._packed(key, 1, 1), 1) + self._heads(self._packed(value, 2, 1), 1)

    def _packed(self, x: torch.Tensor, start: int, count: int) -> torch.Tensor:
        """x through ``count`` of q, k and v of the packed projection: their rows of W, of B and of the biases."""
        weight: Any = self.in_proj_weight
        bias: Any = self.in_proj_bias
        part = self._modules.get("in_proj")
        rows = slice(start * self.embed_dim, (start + count) * self.embed_dim)
        if count < 3:
            weight, bias = weight[rows], None if bias is None else bias[rows]
        if not isinstance(part, LoRAPart):
            return F.linear(x, weight, bias)
        if count == 3 or not part.active:
            return part.product(x, weight, bias)
        a, b = part.factors()
        lora_bias, p = part._lora_bias(), part.dropout_probability if part.training else 0.0
        lora_bias = None if lora_bias is None else lora_bias[rows]
        return lora_linear(x, weight, a, b[rows], bias, lora_bias, scale=part.scaling, dropout=p, backend=part.backend)

    def _heads(self, x: torch.Tensor, count: int) -> list[torch.Tensor]:
        """[..., count · E] -> ``count`` views [N, heads, L, head_dim]; an unbatched x is a batch of one."""
        first = self.batch_first or x.dim() == 2
        x = (x.unsqueeze(0) if x.dim() == 2 else x).unflatten(-1, (count, self.num_heads, self.head_dim))
        return list(x.permute((2, 0, 3, 1, 4) if first else (2, 1, 3, 0, 4)).unbind(0))

    def _mask(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        padding: torch.Tensor | None,
        mask: torch.Tensor | None,
        need_weights: bool,
        is_causal: bool,
    ) -> tuple[torch.Tensor | None, bool]:
        """The sum of both masks, to be added to the scores, and whether the hint of a causal mask replaces it."""
        op, N, L, S = type(self).__name__, q.shape[0], q.shape[2], k.shape[2]
        _checks.require(not is_causal or mask is not None, op, "attn_mask", "be given with is_causal", None)
        if mask is not None:
            shape = [L, S] if mask.dim() == 2 else [N * self.num_heads, L, S]
            _checks.require(list(mask.shape) == shape, op, "attn_mask", f"have shape {shape}", list(mask.shape))
            # Every row sees the columns beyond S; a causal kernel would hide them from most rows.
            extended = self.bias_k is not None or self.add_zero_attn
            if is_causal and padding is None and not need_weights and not extended:
                return None, True
            mask = _additive(mask, q.dtype)
            mask = mask if mask.dim() == 2 else mask.view(N, self.num_heads, L, S)
        if padding is not None:
            shape = [S] if padding.dim() == 1 else [N, S]
            _checks.require(
                list(padding.shape) == shape, op, "key_padding_mask", f"have shape {shape}", list(padding.shape)
            )
            padding = _additive(padding, q.dtype).view(N, 1, 1, S)
            mask = padding if mask is None else mask + padding
        return mask, False

    def _extended(
        self, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """k and v with bias_k, bias_v and a zero after the last position, if the module has them."""
        N, heads, _, d = k.shape
        more: list[tuple[torch.Tensor, torch.Tensor]] = []
        if self.bias_k is not None and self.bias_v is not None:
            more.append((self.bias_k.to(k.dtype).view(1, heads, 1, d), self.bias_v.to(v.dtype).view(1, heads, 1, d)))
        if self.add_zero_attn:
            more.append((k.new_zeros(1, heads, 1, d), v.new_zeros(1, heads, 1, d)))
        for add_k, add_v in more:
            k = torch.cat([k, add_k.expand(N, -1, -1, -1)], 2)
            v = torch.cat([v, add_v.expand(N, -1, -1, -1)], 2)
            mask = None if mask is None else F.pad(mask, (0, 1))
        return k, v, mask

    def _nested(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any) -> Any:
        """Self-attention of a nested x, which nn.TransformerEncoder makes of a padded one: pad, attend, nest."""
        op, (padding, need_weights, mask, average) = type(self).__name__, rest
        _checks.require(
            query is key and key is value, op, "query", "be key and value where it is nested", "another tensor"
        )
        _checks.require(self.batch_first, op, "query", "not be nested without batch_first", "a nested tensor")
        alone = padding is None and mask is None
        _checks.require(alone, op, "attn_mask", "be None for a nested query, as key_padding_mask", "a mask")
        lengths = [len(row) for row in query.unbind()]
        x = torch.nested.to_padded_tensor(query, 0.0)
        hidden = torch.arange(x.shape[1], device=x.device) >= torch.tensor(lengths, device=x.device).unsqueeze(1)
        y, weights = self.forward(x, x, x, hidden, need_weights, None, average)
        return torch.nested.as_nested_tensor([row[:n] for row, n in zip(y, lengths, strict=True)]), weights


def _additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """An additive mask: -inf where a boolean mask hides; a float mask is additive already."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))
    _checks.require_dtype(
        mask.is_floating_point(), "LoRAMultiheadAttention", "mask", "be boolean or floating point", mask.dtype
    )
    return mask.to(dtype)
