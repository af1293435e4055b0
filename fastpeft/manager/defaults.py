"""The modules that a method adapts if no targets are named."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastpeft.manager import methods
from fastpeft.ops import _checks

# Output projections of attentions and of MLPs, as torch and transformers name them.
_ATTENTIONS = ("self_attn", "self_attn.o_proj", "self_attn.out_proj", "self_attn.dense", "attention.output.dense",
               "attention.out_lin", "attn.c_proj", "attn.out_proj", "SelfAttention.o")  # fmt: skip
_MLPS = ("linear2", "mlp.down_proj", "mlp.c_proj", "mlp.fc2", "fc2", "mlp.dense_4h_to_h", "ffn.lin2", "output.dense",
         "DenseReluDense.wo", "mlp.fc_out")  # fmt: skip


def of(op: str, method: str, model: nn.Module, modules: dict[str, nn.Module], kind: str) -> list[str]:
    """The paths for a method: known output projections for `Adapter`, else linear layers and attentions but the head.

    Raises     ValueError: the model has none.
    """
    if method == "adapter":
        wanted = (*(_ATTENTIONS if kind == "houlsby" else ()), *_MLPS)
        names = [path for path, module in modules.items() if methods.supports(method, module, kind)
                 and any(path == name or path.endswith(f".{name}") for name in wanted)]  # fmt: skip
        if kind != "houlsby":
            names = [path for path in names if not any(path.endswith(name) for name in _ATTENTIONS)]
        # A torch attention is listed in place of its own out_proj.
        names = [path for path in names if path.rpartition(".")[0] not in names]
    else:
        head = _head(model, modules)
        names = [path for path, module in modules.items() if path and path not in head and methods.sizes(module)]
        if method == "lora":  # an attention is adapted as a whole, including its inputs
            whole = [path for path, module in modules.items() if path and methods.is_attention(module)]
            names = [path for path in names if path.rpartition(".")[0] not in whole] + whole
    _checks.require(bool(names), op, "target_modules", "be given for this model", None)
    return names


def _head(model: Any, modules: dict[str, nn.Module]) -> set[str]:
    """The output layer, which is not part of the body: as transformers names it, or the model's last linear child."""
    linear = [path for path, module in modules.items() if path and methods.sizes(module)]
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    found = {path for path, module in modules.items() if head is not None and module is head}
    if not found and len(linear) > 1 and "." not in linear[-1]:
        found = {linear[-1]}
    return found
