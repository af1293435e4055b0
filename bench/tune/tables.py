"""The tables that the tuner writes into kernels/: their text, and a copy of all that was tuned in one results file."""

import json
import re
from collections.abc import Callable
from pathlib import Path

from common import tree


def format_tiles(tiles: dict) -> str:
    """The dict literal of a kernel file's TILES, one entry a line, in a stable order."""
    lines = []
    for key in sorted(tiles, key=str):
        values = ", ".join(f"{name}={value!r}" for name, value in tiles[key].items())
        literal = ", ".join(f'"{part}"' if isinstance(part, str) else repr(part) for part in key)
        lines.append(f"    ({literal}): dict({values}),")
    return "TILES = {\n" + "\n".join(lines) + "\n}"


def _with_section(path: Path, marker: str, body: str) -> str:
    """The text with what stands between `# <marker>: begin` and `# <marker>: end` replaced."""
    text = path.read_text()
    pattern = re.compile(rf"(# {marker}: begin[^\n]*\n).*?(# {marker}: end)", re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise ValueError(f"tune: {path.name} must hold one pair of '# {marker}: begin/end' comments")
    return pattern.sub(lambda match: f"{match[1]}{body}\n{match[2]}", text)


def replace_section(path: Path, marker: str, body: str) -> None:
    """Rewrites what stands between `# <marker>: begin` and `# <marker>: end`. ValueError without exactly one pair."""
    tree.write_atomic(path, _with_section(path, marker, body))


def format_strategies(table: dict) -> str:
    """The section of kernels/_strategy_table.py with these entries."""
    lines = [f"    {key!r}: {table[key]!r},".replace("'", '"') for key in sorted(table, key=str)]
    return "\n".join(["TABLE: dict[tuple, str] = {", *lines, "}"]) if table else "TABLE: dict[tuple, str] = {}"


def own_entries(tiles: dict, owner: int | str, dtype: str, mode: str, lookup: Callable[[int], dict]) -> dict:
    """Entries of this exact device or arch for (dtype, mode); where it has none, copies of those it falls back to.

    All of them, not just the tuned rank's: a lookup takes the owner first, so a lone entry would hide the rest.
    """
    mine = {key: tile for key, tile in tiles.items() if key[:3] == (owner, dtype, mode)}
    if mine:
        return mine
    ranks = {key[3] for key in tiles if key[1:3] == (dtype, mode)}
    return {(owner, dtype, mode, rank): dict(lookup(rank)) for rank in ranks}


def neighbours(tile: dict, space: list[dict]) -> list[dict]:
    """Candidates that differ from `tile` in one key."""
    return [other for other in space if sum(other.get(k) != tile.get(k) for k in {*other, *tile}) == 1]


class Tables:
    """Sections of the files under `root`, each also kept in one file of the results, which may be all that comes back
    from a machine."""

    def __init__(self, root: Path, kept: Path):
        self.root, self.kept = root, kept

    def write(self, name: str, marker: str, body: str) -> None:
        """Into root/<name>.py and into the results; each under a temporary name, then renamed."""
        replace_section(self.root / f"{name}.py", marker, body)
        sections = json.loads(self.kept.read_text()) if self.kept.exists() else {}
        sections[name] = {"marker": marker, "body": body}
        tree.write_atomic(self.kept, json.dumps(sections, indent=1) + "\n")


def install(kept: Path, root: Path) -> list[str]:
    """Puts the sections of a results file into the files under `root`; their names. Nothing is written if one fails."""
    sections = json.loads(kept.read_text())
    for name, section in sections.items():
        _with_section(root / f"{name}.py", section["marker"], section["body"])
    for name, section in sections.items():
        replace_section(root / f"{name}.py", section["marker"], section["body"])
    return list(sections)
