"""Triton device code: one file an operator, launchers without validation or autograd.

The files are those of the folder kernels/, which an installed package has inside itself and a checkout beside itself.
It has no ``__init__.py``: Python started in the checkout would take it for the package ``kernels`` of another project.
"""

from pathlib import Path

_INSIDE = Path(__file__).resolve().with_suffix("")
_BESIDE = _INSIDE.parent.parent / "kernels"
__path__ = [str(folder) for folder in (_INSIDE, _BESIDE) if folder.is_dir()][:1]
if not __path__:
    raise ImportError(f"fastpeft.kernels: the Triton kernels must lie in {_INSIDE} or {_BESIDE}, got neither")
