"""Make docs/figures/room.png, the contact sheet of a synthetic room: ``python docs/scripts/room.py [SHEET]``.

Without SHEET, one room is generated in a temporary folder. The sheet is reduced to 64 colours to stay below 300 kB.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[2]
WIDTH = 960


def make_sheet(folder: Path) -> Path:
    """Generate one room with `prepare.py synthetic`; returns its contact sheet."""
    command = [sys.executable, "launchers/prepare.py", "synthetic", "--out", str(folder / "scenes")]
    subprocess.run([*command, "--train_scenes", "1", "--val_scenes", "1"], cwd=ROOT, check=True)
    return min((folder / "scenes").rglob("contact_sheets/*.png"))


def reduce(sheet: Path, out: Path) -> None:
    """Write a smaller copy with a palette."""
    with Image.open(sheet) as image:
        size = (WIDTH, round(image.height * WIDTH / image.width))
        small = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    small.quantize(64).save(out, optimize=True)


if __name__ == "__main__":
    target = ROOT / "docs" / "figures" / "room.png"
    with tempfile.TemporaryDirectory() as temporary:
        reduce(Path(sys.argv[1]) if len(sys.argv) > 1 else make_sheet(Path(temporary)), target)
    print(f"{target}: {target.stat().st_size} bytes")
