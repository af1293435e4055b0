import hashlib
from pathlib import Path

__version__ = "0.1.0"


def source_hash(folder: Path) -> str:
    """Hash of the C++ and CUDA sources in ``folder``: what an extension was compiled from, or what is there now."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*.*") if path.is_file() and path.suffix != ".md"):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
