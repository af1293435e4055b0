"""Sphinx: the guide in docs/*.md, and a page for every public name from its docstring. `make docs` builds both."""

import inspect
from pathlib import Path

import fastpeft

project, author, release = "fastpeft", "fastpeft", fastpeft.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc"]
html_theme = "furo"
templates_path: list[str] = []
exclude_patterns = ["_build"]
autodoc_typehints = "none"  # a docstring gives shapes and dtypes, which say more
autodoc_member_order = "bysource"
suppress_warnings = ["myst.xref_missing"]  # links to files of the repository beside docs/
myst_heading_anchors = 2

HERE = Path(__file__).parent
PAGES = {"fastpeft": fastpeft, "fastpeft.ops": fastpeft.ops, "fastpeft.models": fastpeft.models}


def write_pages(app) -> None:
    """api/<module>.rst: each public name of the module, in its order."""
    folder = HERE / "api"
    folder.mkdir(exist_ok=True)
    for module, held in PAGES.items():
        lines = [module, "=" * len(module), ""]
        for name in held.__all__:
            value = getattr(held, name)
            if inspect.isclass(value):
                lines += [f".. autoclass:: {module}.{name}", "   :members:", "   :show-inheritance:", ""]
            elif callable(value):
                lines += [f".. autofunction:: {module}.{name}", ""]
        text = "\n".join(lines)
        path = folder / f"{module}.rst"
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


def literal(app, what, name, obj, options, lines) -> None:
    """Docstrings have aligned columns, which markup would join into one paragraph."""
    if any(lines):
        lines[:] = ["::", "", *("   " + line for line in lines), ""]


def setup(app) -> None:
    app.connect("builder-inited", write_pages)
    app.connect("autodoc-process-docstring", literal)
