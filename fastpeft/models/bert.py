"""LoRABERT and SentimentClassifier: a BERT-like encoder with LoRA in its own projections."""

from __future__ import annotations

import importlib
import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastpeft.models._adapted import Adapted, adapt, slide_options
from fastpeft.nn.config import adapter_dtype, flag, size
from fastpeft.nn.layers.lora_linear import LoRALinear
from fastpeft.ops import _checks

_OPTIONS = ("adapter_dtype",)


def _transformers(op: str) -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise ImportError(f"{op}: transformers must be installed for a model by name, or a model be given") from error


def _loaded(op: str, name: str, classes: int | None) -> tuple[nn.Module, frozenset[str]]:
    """The model ``name`` from a folder or the hub, and the parameters that its checkpoint lacks.

    classes    if the checkpoint is a classifier of this many classes, its head is loaded too
    """
    library, local = _transformers(op), os.path.isdir(name)
    kind = library.AutoModel
    if classes is not None:
        config = library.AutoConfig.from_pretrained(name, local_files_only=local)
        classifier = any(arch.endswith("ForSequenceClassification") for arch in config.architectures or ())
        if classifier and config.num_labels == classes:
            kind = library.AutoModelForSequenceClassification
    model, info = kind.from_pretrained(name, local_files_only=local, output_loading_info=True)
    return model, frozenset(info["missing_keys"])


def _model(op: str, model: object, classes: int | None = None) -> tuple[nn.Module, list[nn.Parameter]]:
    """``model``, or the model that it names, and those of its parameters that no checkpoint has filled."""
    if isinstance(model, nn.Module):
        return model, []
    rule = "be a model, a local folder or a name on the hub"
    _checks.require_dtype(isinstance(model, (str, os.PathLike)), op, "model", rule, type(model).__name__)
    assert isinstance(model, (str, os.PathLike))
    name = os.fspath(model)
    # A name that means a folder is never looked up on the hub.
    folder = not isinstance(model, str) or os.path.isabs(name) or name.startswith(".")
    _checks.require(not folder or os.path.isdir(name), op, "model", "be a folder that exists", repr(name))
    loaded, missing = _loaded(op, name, classes)
    return loaded, [parameter for key, parameter in loaded.named_parameters() if key in missing]


def _body(model: nn.Module) -> nn.Module:
    """A transformers model without its head."""
    body = getattr(model, "base_model", model)
    return body if isinstance(body, nn.Module) else model


def _projections(op: str, model: nn.Module) -> dict[str, nn.Module]:
    """Every nn.Linear in the repeated layers of the body: q, k, v, the attention's output and both MLP layers."""
    inside = set(_body(model).modules())
    stacks = [path for path, module in model.named_modules() if isinstance(module, nn.ModuleList) and module in inside]
    found: dict[str, nn.Module] = {
        path: module
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.Linear) and any(path.startswith(stack + ".") for stack in stacks)
    }
    _checks.require(bool(found), op, "model", "have nn.Linear in an nn.ModuleList of layers", type(model).__name__)
    return found


def _outside(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of ``model`` outside its body: those of its head, except ones tied to the body."""
    inside = {id(parameter) for parameter in _body(model).parameters()}
    return [parameter for parameter in model.parameters() if id(parameter) not in inside]


class LoRABERT(Adapted):
    """A BERT-like encoder with LoRA in its own projections, each layer's query, key, value, attention output and MLP.

    LoRABERT(model, rank=4, **options)

    model      a transformers model, which is adapted in place, with its weights; or a folder or a name on the hub, from
               which AutoModel's class is loaded
    rank       of every adapter
    train_head whether to train what a given model has outside its ``base_model`` (a classifier), and what a loaded
               checkpoint lacks
    options    of LoRALinear: by default init "randn", scaling 0.01 and no dropout; ``alpha`` selects kaiming and α/r
    Call       as the model's own: ``(**tokenizer(...))``, including token_type_ids and labels
    Output     the model's own; before training identical to the unadapted model's
    Raises     TypeError: no model or name, an unknown option.  ValueError: no layers to adapt, a folder that does not
               exist, a range. The model is unchanged then.  ImportError: a name without transformers.
    """

    def __init__(
        self, model: nn.Module | str | os.PathLike[str], rank: int = 4, *, train_head: bool = True, **options: Any
    ) -> None:
        op = type(self).__name__
        flag(op, "train_head", train_head)
        given = slide_options(op, size(op, "rank", rank), options, *_OPTIONS, "train_head")
        bert, new = _model(op, model)
        head = [*new, *(_outside(bert) if train_head else ())]
        adapt(bert, _projections(op, bert), lambda layer: LoRALinear(original_layer=layer, **given))
        super().__init__()
        self.bert = bert
        self.training = bert.training
        self._freeze(head)

    def forward(self, *args: Any, **inputs: Any) -> Any:
        return self.bert(*args, **inputs)


class SentimentClassifier(Adapted):
    """A classifier of texts: LoRA in the encoder's own projections, and a trained head on its pooled output.

    SentimentClassifier(model, num_classes=2, rank=4, **options)

    model      as in LoRABERT. An encoder gets a head, ``classifier``: an nn.Linear after the dropout of its config, on
               the output of the pooler or, without a pooler, of the first token. A classifier keeps its head, which
               must have num_classes outputs
    options    as in LoRABERT
    Call       ``(**tokenizer(...))``, token_type_ids included; labels [B] int64 too
    Output     logits [B, num_classes]; with labels (cross entropy, logits)
    Raises     as LoRABERT; ValueError: a head with another number of classes.
    """

    def __init__(
        self, model: nn.Module | str | os.PathLike[str], num_classes: int = 2, rank: int = 4, **options: Any
    ) -> None:
        op = type(self).__name__
        size(op, "num_classes", num_classes, least=2)
        given = slide_options(op, size(op, "rank", rank), options, *_OPTIONS)
        bert, new = _model(op, model, num_classes)
        config: Any = getattr(bert, "config", None)
        head = _outside(bert)
        if head:
            labels = getattr(config, "num_labels", None)
            classifies = type(bert).__name__.endswith("ForSequenceClassification")
            _checks.require(classifies, op, "model", "be an encoder or a classifier of sequences", type(bert).__name__)
            _checks.require(labels == num_classes, op, "num_classes", f"be {labels}, as the model has", num_classes)
        width = None if head else size(op, "model.config.hidden_size", getattr(config, "hidden_size", None))
        adapt(bert, _projections(op, bert), lambda layer: LoRALinear(original_layer=layer, **given))
        super().__init__()
        self.bert = bert
        self.num_classes = num_classes
        self.classifier: nn.Linear | None = None
        if width is not None:
            like = next(bert.parameters())
            rates = (getattr(config, name, None) for name in ("classifier_dropout", "hidden_dropout_prob"))
            self.dropout = nn.Dropout(next((rate for rate in rates if rate is not None), 0.0))
            dtype = adapter_dtype(op, options.get("adapter_dtype"), like)
            self.classifier = nn.Linear(width, num_classes, device=like.device, dtype=dtype)
            head = [*self.classifier.parameters()]
        self.train(bert.training)
        self._freeze([*new, *head])

    def forward(self, *args: Any, labels: torch.Tensor | None = None, **inputs: Any) -> Any:
        out = self.bert(*args, **inputs)
        if self.classifier is None:
            logits: torch.Tensor = out.logits
        else:
            pooled = getattr(out, "pooler_output", None)
            pooled = out[0][:, 0] if pooled is None else pooled
            logits = self.classifier(self.dropout(pooled.to(self.classifier.weight.dtype)))
        return logits if labels is None else (F.cross_entropy(logits.float(), labels), logits)
