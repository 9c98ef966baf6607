"""The card of the tiny VGGT's weights: data, settings, time, curve, errors on other rooms, and SHA-256 of the files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from w2r2_ds.demo.pretraining.card_files import machine_text, origin, write_files
from w2r2_ds.demo.pretraining.vggt.errors import baseline, evaluate
from w2r2_ds.demo.pretraining.vggt.room_views import IMAGE_SIZE, VIEWS, Choice, RoomViews, ViewBatch
from w2r2_ds.demo.pretraining.vggt.scenes import NEAR, SPREAD, VGGTSettings
from w2r2_ds.models.vggt.config import HEADS
from w2r2_ds.models.vggt.loading import load_vggt
from w2r2_ds.models.vggt.model import VGGT

WEIGHTS = Path(__file__).parents[2] / "weights" / "vggt"
"""Folder of the weights that the package contains."""
VAL_ROOMS = 48
"""Rooms of the evaluation."""
BASELINE_ROOMS = 16
"""Training rooms from which the constants of the baseline are computed."""
_LIBRARIES = ("torch", "numpy", "scipy", "trimesh", "embreex", "pillow")


def write_card(folder: Path, settings: VGGTSettings, record: Mapping[str, Any]) -> None:
    """Evaluate the weights in `folder`, and write ``card.json`` and ``card.md`` beside them.

    Args:
        folder: of ``config.json`` and ``model.safetensors``.
        settings: settings of the training.
        record: its time in seconds, first losses and curve.
    """
    vggt = load_vggt(folder, HEADS)
    card = {
        "parameters": sum(parameter.numel() for parameter in vggt.parameters()),
        "settings": asdict(settings),
        **record,
        "errors": {name: errors(vggt, settings.seed, views) for name, views in (("spread", SPREAD), ("near", NEAR))},
        **origin(folder, _LIBRARIES),
    }
    write_files(folder, card, card_text(card))


def errors(vggt: VGGT, seed: int, views: tuple[int, ...]) -> dict[str, dict[str, float]]:
    """Errors on the same views of all validation rooms: of the model, and of constants of training rooms."""
    val = RoomViews(seed, "val")
    batches = [view_batch(val, views, range(start, min(start + 8, VAL_ROOMS))) for start in range(0, VAL_ROOMS, 8)]
    constants = view_batch(RoomViews(seed, "train"), views, range(BASELINE_ROOMS))
    return {"model": asdict(evaluate(vggt, batches)), "constants": asdict(baseline(batches, constants))}


def view_batch(rooms: RoomViews, views: tuple[int, ...], indices: range) -> ViewBatch:
    """The same views of several rooms."""
    return rooms.batch([Choice(room, views) for room in indices])


def card_text(card: Mapping[str, Any]) -> str:
    """The text of ``card.md``."""
    rows = [
        f"| {views} | {predicted} | " + " | ".join(f"{value:.3g}" for value in values.values()) + " |"
        for views, found in card["errors"].items()
        for predicted, values in found.items()
    ]
    return _TEXT.format(
        s=VGGTSettings(**card["settings"]),
        parameters=card["parameters"] / 1e6,
        size=f"{IMAGE_SIZE[0]} x {IMAGE_SIZE[1]}",
        views=VIEWS,
        degrees=360 // VIEWS,
        val=VAL_ROOMS,
        minutes=round(card["seconds"] / 60),
        cpu=machine_text(card),
        rows="\n".join(rows),
    )


_TEXT = """# A tiny VGGT of synthetic rooms

{parameters:.2f} million parameters (bfloat16): aggregator, camera head, depth head and point head, with the parameter
names of the public checkpoint. Trained from random weights; not a model of real images.

* **Data.** {s.rooms} synthetic rooms of `w2r2_ds/demo/synthetic`, seed {s.seed}, and their mirror images; {views}
  views of {size} pixels on a path around each room, {degrees} degrees apart, after a JPEG round trip; one focal length.
  The second number of a room's seed is 4 (training) or 5 (evaluation): no room of a demo is among these.
* **Scale.** Lengths have no metric scale. They are in the frame of the first camera, in units of the mean distance of
  the scene's points from it, as in VGGT.
* **Training.** {s.steps} steps of {s.scenes} scenes of 4 frames; losses of VGGT (camera x {s.camera_weight:g}; depth
  and points of {s.dense_frames} frames) and auxiliary losses (matching, headings, relative poses of pairs), whose heads
  are dropped; Muon {s.muon_lr:g} for the matrices of blocks, AdamW {s.adamw_lr:g}; flat, then linear to 0 over the last
  {s.decay:.0%}. Curve, first losses, versions and SHA-256 of every file are in `card.json`.
* **Time.** {minutes} minutes on a machine with other work ({cpu}).

Repeat it with `python -m w2r2_ds.demo.pretraining.vggt --out FOLDER`.

Medians on {val} rooms that are not in the training. *spread*: views 0, 60, 180 and 300 degrees along the path, as the
demo's; *near*: neighbouring views. *constants*: median depth and median point of training rooms, all cameras equal to
the first. Depth is relative to the true depth, rotation in degrees, points and translation in units of the scale.

| views | predictions | depth | points | rotation | translation |
|---|---|---|---|---|---|
{rows}
"""
