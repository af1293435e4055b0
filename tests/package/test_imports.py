"""What an import costs and needs: torch alone, nothing at the top level but fastpeft."""

import importlib.metadata
import subprocess
import sys

import pytest

import fastpeft


def test_public_names():
    assert sorted(fastpeft.__all__) == fastpeft.__all__
    assert all(hasattr(fastpeft, name) for name in fastpeft.__all__)


@pytest.mark.parametrize(
    "absent", ["peft", "safetensors", "transformers", "triton", "numpy", "fastpeft._C", "matplotlib"]
)
def test_import_without(absent):
    """The package imports, and serves a layer, where an optional dependency or the extension is missing."""
    code = f"""
import sys
sys.modules[{absent!r}] = None
import torch, fastpeft
x, w, a, b = torch.ones(2, 4), torch.ones(3, 4), torch.ones(1, 4), torch.ones(3, 1)
assert fastpeft.ops.lora_linear(x, w, a, b).tolist() == [[8.0] * 3] * 2
assert "fastpeft" in str(fastpeft.info())
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_extension_of_another_version():
    """It says so, and how to mend it; it does not pass for one that was never built."""
    code = """
import sys, types
other = types.ModuleType("fastpeft._C")
other.__file__ = "_C.so"
import torch, fastpeft
sys.modules["fastpeft._C"] = fastpeft._C = other
x, w, a, b = torch.ones(2, 4), torch.ones(3, 4), torch.ones(1, 4), torch.ones(3, 1)
try:
    fastpeft.ops.lora_linear(x, w, a, b)
except RuntimeError as error:
    print(error)
"""
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert "must be of this version" in said and "build it again" in said and "remove _C.so" in said


def test_import_brings_in_no_optional_dependency():
    code = "import sys, fastpeft; print(sorted({'peft', 'transformers', 'triton', 'matplotlib'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    plain = subprocess.run(
        [sys.executable, "-c", code.replace(", fastpeft", ", torch")], check=True, capture_output=True, text=True
    )
    assert found == plain.stdout


def test_installed_top_level():
    files = importlib.metadata.files("fastpeft") or []
    names = {file.parts[0] for file in files if not file.parts[0].startswith(("__editable__", "..", "__pycache__"))}
    assert all(name == "fastpeft" or name.startswith(("fastpeft-", "__editable___fastpeft")) for name in names), names
