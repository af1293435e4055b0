"""docs/files.md: its blocks run one after the other, as a reader would run them."""

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "files.md"


def test_blocks(tmp_path, monkeypatch):
    pytest.importorskip("safetensors")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 4
    given = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), given)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapters",
        "lora.pt",
        "my-adapter",
        "style.safetensors",
    ]
    assert list(given["manager"].methods) == ["lora"]
