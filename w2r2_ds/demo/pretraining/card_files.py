"""What the cards of all weights have: the machine, the versions and the hashes of the files."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from w2r2_ds.utils.files.hashing import file_sha256
from w2r2_ds.utils.versions import processor_name

CARD, TEXT = "card.json", "card.md"


def origin(folder: Path, libraries: Iterable[str]) -> dict[str, Any]:
    """``machine``, ``versions`` of Python and the libraries, and ``files`` (hashes) of the weights in a folder."""
    return {
        "machine": machine(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in libraries}},
        "files": file_hashes(folder),
    }


def machine() -> dict[str, Any]:
    """Cores and instruction set of this machine, without its name."""
    return {
        "cpu": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def machine_text(card: Mapping[str, Any]) -> str:
    """The machine of a card, for its text."""
    found = card["machine"]
    return f"{found['cpu']}, {found['threads']} thread(s), {found['instructions']}"


def file_hashes(folder: Path) -> dict[str, str]:
    """Path in the folder -> SHA-256, for all files except the card itself."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in (CARD, TEXT))
    return {path.relative_to(folder).as_posix(): file_sha256(path) for path in files}


def write_files(folder: Path, card: Mapping[str, Any], text: str) -> None:
    """Write a card as ``card.json`` and its text as ``card.md``."""
    (folder / CARD).write_text(json.dumps(card, indent=1) + "\n")
    (folder / TEXT).write_text(text)
