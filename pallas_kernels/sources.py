"""What a folder's Python sources are recognised by."""

from __future__ import annotations

import hashlib
from pathlib import Path


def sources_in(root: Path) -> list[Path]:
    """Returns all Python sources below a folder, in order."""
    return sorted(root.rglob("*.py"))


def digest_of_sources(root: Path) -> str:
    """Returns the SHA-256 (hex) over the contents and places of all Python sources below a folder."""
    digest = hashlib.sha256()
    for path in sources_in(root):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()
