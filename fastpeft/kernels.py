"""Triton device code: one file per operator, launchers without validation or autograd.

The files are those of the folder kernels/, which is inside an installed package but beside fastpeft/ in a checkout. It
has no ``__init__.py``, or Python started in the checkout would take it for another project's package ``kernels``.
"""

from pathlib import Path

_INSIDE = Path(__file__).resolve().with_suffix("")
_BESIDE = _INSIDE.parent.parent / "kernels"
__path__ = [str(folder) for folder in (_INSIDE, _BESIDE) if folder.is_dir()][:1]
if not __path__:
    raise ImportError(f"fastpeft.kernels: the Triton kernels must lie in {_INSIDE} or {_BESIDE}, got neither")
