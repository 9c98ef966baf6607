"""Export: ``python launchers/export.py --checkpoint RUN --out ADAPTER``."""

from __future__ import annotations

import sys
from pathlib import Path

from jsonargparse import auto_cli

from w2r2_ds.config.cli import Parser
from w2r2_ds.convert.peft_adapter import export_adapter
from w2r2_ds.utils.sanitize import message


def main(checkpoint: Path, out: Path, vlm: str | None = None, vggt: str | None = None) -> None:
    """Write a PEFT directory, geometry_merger.safetensors and a card.

    Args:
        checkpoint: run or checkpoint.
        out: new folder.
        vlm: directory or hub id of the video LLM, if not where it was in training.
        vggt: directory or hub id of VGGT, if not where it was in training.
    """
    print(f"adapter: {export_adapter(checkpoint, out, vlm, vggt)}")


if __name__ == "__main__":
    try:
        auto_cli(main, as_positional=False, parser_class=Parser)
    except ValueError as error:
        sys.exit(f"export.py: {message(error)}")
