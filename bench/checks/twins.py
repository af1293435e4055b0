"""What the PTX wrappers of csrc/cuda/fp_cuda.h answer on a GPU: golden vectors for the emulator, and a comparison.

The questions, the build by nvcc and the file are those of tests/emulator/golden.py.
"""

import ctypes
import tempfile
from pathlib import Path

import torch

from common import tree
from emulator import build, golden

Words = dict[str, list[int]]


def keep(words: Words, environment: dict, twins: Words | None) -> str:
    """Writes a GPU's words. AssertionError, once they are written, where the twins give others."""
    about = {key: environment[key] for key in ("gpu", "cc", "cuda", "date")}
    tree.save_json(golden.FILE.stem, about | {"words": words})
    if twins is None:
        return "golden vectors written; no C++ compiler here to compare the twins"
    for name, row in words.items():
        wrong = [i for i, (word, other) in enumerate(zip(row, twins[name], strict=True)) if word != other]
        assert not wrong, f"the twins differ from this GPU in {len(wrong)} words of {name}, first {wrong[0]}"
    return "golden vectors written, the emulator's twins give the same"


def check_twins(ctx) -> str:
    if ctx.device == "cpu":
        return "left out: needs a GPU"
    major, minor = torch.cuda.get_device_capability()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            library = ctypes.CDLL(str(golden.build_for_gpu(folder, 10 * major + minor)))
        except FileNotFoundError as missing:
            return f"left out: {missing}"
        words, twins = golden.answers(library, "cuda"), None
        if build.compiler() is not None:
            twins = golden.answers(ctypes.CDLL(str(golden.build_for_cpu(folder))), "cpu")
    return keep(words, tree.environment("cuda"), twins)


CHECKS = {"PTX twins": check_twins}
