"""Strength of the camera shift of docs/research/study.md: ``python docs/scripts/camera_strength.py``.

Prints, per strength, how many items of val_camera can be scored: those whose truth and cue are apart. No model is used.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from w2r2_ds.data.sources.shortcut_cues import cues_file, read_cues
from w2r2_ds.demo.synthetic.options import ShiftOptions
from w2r2_ds.demo.synthetic.write import write_dataset
from w2r2_ds.diagnostics.shortcut_cue import Measure, cue_shares

ROOMS, FRAMES, SIZE, SEED = 30, 6, (168, 112), 101
"""Validation rooms per strength, frames per room, width and height, and a seed that the study does not use."""
STRENGTHS = ((0.5, 10.0), (0.5, 0.0), (0.8, 10.0), (0.8, 5.0), (0.8, 0.0), (0.0, 10.0), (0.0, 15.0), (0.8, 15.0))
"""Metres by which cameras are lowered, and degrees by which they are turned up."""


def row(folder: Path, drop: float, flatter: float, rooms: int = ROOMS) -> list[str]:
    """Cells of one strength: items, items with a cue, median distance, and shares of all items that are scored."""
    shift = ShiftOptions(("camera",), camera_drop=drop, camera_flatter=flatter)
    root = write_dataset(
        folder, SEED, 1, rooms, SIZE, FRAMES, 1, shift=shift, sentences="phrases", world_frame="corner"
    ).root
    cues = list(read_cues(cues_file(root, "val_camera")).values())
    truth, boxes = [cue.truth for cue in cues], [cue.world_box() for cue in cues]
    apart = [np.linalg.norm(np.subtract(b, t)[:3]) for b, t in zip(boxes, truth, strict=True) if b is not None]
    measures: tuple[Measure, ...] = ("iou", "centre")
    scored = [cue_shares(truth, truth, boxes, measure).scored / len(cues) for measure in measures]
    cells = [f"{drop:g} m", f"{flatter:g}°", str(len(cues)), str(len(apart)), f"{np.median(apart):.2f} m"]
    return [*cells, *(f"{share:.0%}" for share in scored)]


if __name__ == "__main__":
    print("| lower | flatter | items | with a cue | distance | scored by IoU | scored by centre |\n|" + "---|" * 7)
    for drop, flatter in STRENGTHS:
        with tempfile.TemporaryDirectory() as temporary:
            print(f"| {' | '.join(row(Path(temporary) / 'rooms', drop, flatter))} |", flush=True)
