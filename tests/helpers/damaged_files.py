"""Damage files: flip a bit, truncate."""

from __future__ import annotations

from pathlib import Path


def flip(file: Path, at: int) -> None:
    """Change one bit of the byte at index `at`."""
    content = bytearray(file.read_bytes())
    content[at] ^= 4
    file.write_bytes(content)
