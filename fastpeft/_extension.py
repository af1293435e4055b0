"""The compiled extension ``_C`` of this very package, checked before it is used.

Importing raises ImportError, with the reason, if there is no extension, it is another checkout's or it does not load;
RuntimeError if it was built from another version.
"""

from __future__ import annotations

import importlib.util
import sys
import warnings
from pathlib import Path

from fastpeft import _installed
from fastpeft._version import __version__, source_hash

_NAME = "fastpeft._C"

if _NAME not in sys.modules:
    _spec = importlib.util.find_spec(_NAME)
    if _spec is None or _spec.origin is None:
        raise ImportError(_installed.absent(), name=_NAME)
    # The finder of an editable installation offers its own checkout's extension to every other checkout.
    if (_folder := Path(_spec.origin).parent.resolve()) != _installed.HERE:
        raise ImportError(f"{_installed.absent()}; that in {_folder} is another checkout's", name=_NAME)

from fastpeft import _C  # type: ignore[attr-defined]  # noqa: E402

_built = getattr(_C, "version", "another")
if _built != __version__:
    raise RuntimeError(
        f"fastpeft: the compiled extension must be of this version, {__version__}, got one of {_built}: "
        f"build it again ({_installed.BUILD} .) or remove {_C.__file__}"
    )
if _installed.SOURCES.is_dir() and source_hash(_installed.SOURCES) != _C.sources:
    warnings.warn(
        f"fastpeft: {_C.__file__} was built from other sources than {_installed.SOURCES}: "
        f"`{_installed.BUILD} -e .` builds it again",
        RuntimeWarning,
        stacklevel=2,
    )
