"""The commands of this folder: ``python bench WORD [arguments]``; without a word, the list."""

import ast
import importlib
import sys
from pathlib import Path

import common  # noqa: F401 - fastpeft becomes importable

WORDS = {
    "gpu": "gpu.driver",
    "budget": "gpu.budget",
    "host": "gpu.host_time",
    "model": "gpu.model",
    "tune": "tune.command",
    "paths": "tune.paths",
    "kernels": "compile.kernels",
    "cuda": "compile.cuda",
    "kills": "checks.kill_saves",
    "sanitized": "checks.sanitized",
    "roof": "common.roofline",
    "report": "common.report",
}


def main(argv: list[str]) -> int:
    if not argv or argv[0] not in WORDS:
        for word, module in WORDS.items():
            path = Path(__file__).parent / f"{module.replace('.', '/')}.py"
            print(f"{word:8} {ast.get_docstring(ast.parse(path.read_text())).splitlines()[0]}")
        return 0 if not argv else 2
    word, *arguments = argv
    sys.argv[0] = f"bench {word}"  # what argparse shows
    return importlib.import_module(WORDS[word]).main(arguments) or 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
