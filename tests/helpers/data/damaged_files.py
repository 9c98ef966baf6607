"""Damage a file: flip a bit."""

from __future__ import annotations

from pathlib import Path


def flip_bit(file: Path, at: int) -> None:
    """Flip one bit of the byte at index `at`."""
    content = bytearray(file.read_bytes())
    content[at] ^= 4
    file.write_bytes(content)
