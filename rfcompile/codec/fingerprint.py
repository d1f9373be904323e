"""A hash of the package's sources, for the keys of compile caches and for comparing ranks."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


@lru_cache(maxsize=1)
def source_digest() -> str:
    """Hash of the package's sources, which decide what travels: 16 hex digits."""
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    # In a checkout passes/ is a link, which ** does not follow.
    sources = {*root.rglob("*.py"), *root.rglob("*.cpp"), *(root / "passes").glob("*.py")}
    for path in sorted(sources):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def package_version() -> str:
    """The installed version, or "unknown" when the package runs from a bare checkout."""
    try:
        return version("rfcompile")
    except PackageNotFoundError:
        return "unknown"
