"""Export: ``python launchers/export.py --checkpoint RUN --out ADAPTER``."""

from __future__ import annotations

import sys
from pathlib import Path

from jsonargparse import auto_cli

from w2r2_ds.export.adapter import export_adapter


def main(checkpoint: Path, out: Path) -> None:
    """Write a PEFT directory, geometry_merger.safetensors and a card.

    Args:
        checkpoint: run or checkpoint.
        out: new folder.
    """
    print(f"adapter: {export_adapter(checkpoint, out)}")


if __name__ == "__main__":
    try:
        auto_cli(main, as_positional=False)
    except ValueError as error:
        sys.exit(f"export.py: {error}")
