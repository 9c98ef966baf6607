"""Share of answers that follow the cue of a shifted split instead of the truth.

The cue is the box that 2D appearance alone suggests (``data/sources/shortcut_cues.py``). Every answer is classified as
``truth``, ``cue`` or ``neither``; items whose truth and cue are too close to tell apart are ``unscored``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from w2r2_ds.boxes3d.iou import box_iou

Measure = Literal["iou", "centre", "nearest"]
Label = Literal["truth", "cue", "neither", "unscored"]
Box = Sequence[float] | np.ndarray
"""World box: six numbers (axis-aligned: centre, size; metres) or nine (with ZXY angles; radians)."""

THRESHOLDS: dict[Measure, float] = {"iou": 0.25, "centre": 0.5, "nearest": 0.5}
"""Default thresholds: IoU, and distance of centres in metres."""


@dataclass(frozen=True)
class CueShares:
    """Classification of all answers.

    Attributes:
        labels: one per item, in the order of the input.
        scored: number of items whose truth and cue can be told apart.
        truth: share of the scored items whose answer agrees with the truth.
        cue: share of the scored items whose answer agrees with the cue.
        neither: share of the scored items whose answer agrees with none of both, or has no box.
        position: median over the scored items with a box of ``(p - t) . (c - t) / |c - t|^2`` for the centres of
            prediction p, truth t and cue c: 0 at the truth, 1 at the cue. NaN without such items.

    The shares are NaN if no item is scored.
    """

    labels: tuple[Label, ...]
    scored: int
    truth: float
    cue: float
    neither: float
    position: float


def cue_shares(
    predicted: Sequence[Box | None] | np.ndarray,
    truth: Sequence[Box] | np.ndarray,
    cue: Sequence[Box | None] | np.ndarray,
    measure: Measure = "iou",
    threshold: float | None = None,
) -> CueShares:
    """Classify answers by the box that they agree with.

    ``iou``: a box agrees if its IoU is at least `threshold`; of truth and cue, the one with the larger IoU counts.
    Items whose truth and cue have such an IoU with each other are not scored. ``centre``: the same with the distance of
    the centres, which must be at most `threshold`; it needs no correct size. ``nearest``: the nearer centre at any
    distance; only answers without a box follow neither. It suits models whose answers are rarely correct.

    Args:
        predicted: world boxes of the answers (a list or ``[n, 6 or 9]``); None for an answer without a box.
        truth: annotated world boxes.
        cue: world boxes of the cues; None for an item without a cue, which is not scored.
        measure: ``iou``, ``centre`` or ``nearest``.
        threshold: IoU, or distance in metres; default: `THRESHOLDS`.

    Raises:
        ValueError: the lists have different lengths, a box has not six or nine numbers or is not finite (predictions
            may be), or the measure is unknown.
    """
    if not len(predicted) == len(truth) == len(cue):
        raise ValueError(f"There are {len(predicted)} predictions, {len(truth)} true boxes and {len(cue)} cues.")
    if measure not in THRESHOLDS:
        raise ValueError(f"measure is {measure!r}; it must be iou, centre or nearest.")
    if not len(predicted):
        return CueShares((), 0, np.nan, np.nan, np.nan, np.nan)
    limit = THRESHOLDS[measure] if threshold is None else threshold
    p, t, c = _boxes(predicted, "predicted"), _boxes(truth, "truth"), _boxes(cue, "cue")
    if np.isnan(t).any():
        raise ValueError("Every item needs a finite true box.")
    # Agreement, larger is closer; a NaN box agrees with nothing.
    agreement = _iou if measure == "iou" else _closeness
    apart = limit if measure == "iou" else -limit
    needed = -np.inf if measure == "nearest" else apart
    has_cue, has_box = np.isfinite(c).all(axis=1), np.isfinite(p).all(axis=1)
    scorable = has_cue & (agreement(t, c) < apart)
    labels = tuple(
        _label(one, other, needed if answered else np.inf) if usable else "unscored"
        for usable, answered, one, other in zip(scorable, has_box, agreement(p, t), agreement(p, c), strict=True)
    )
    counts = Counter(labels)
    scored = len(labels) - counts["unscored"]
    truth_share, cue_share, neither = (
        counts[label] / scored if scored else np.nan for label in ("truth", "cue", "neither")
    )
    placed = scorable & has_box
    offset, line = (p - t)[placed, :3], (c - t)[placed, :3]
    positions = (offset * line).sum(axis=1) / np.maximum((line**2).sum(axis=1), 1e-12)
    position = float(np.median(positions)) if len(positions) else np.nan
    return CueShares(labels, scored, truth_share, cue_share, neither, position)


def _label(with_truth: float, with_cue: float, needed: float) -> Label:
    """Class of an answer from its agreement with the truth and with the cue, and the agreement that is needed."""
    if max(with_truth, with_cue) < needed:
        return "neither"
    return "truth" if with_truth >= with_cue else "cue"


def _boxes(boxes: Sequence[Box | None] | np.ndarray, name: str) -> np.ndarray:
    """``[n, 9]`` float64; NaN for None and for a box that is not finite."""
    rows = np.full((len(boxes), 9), np.nan)
    for number, box in enumerate(boxes):
        if box is None:
            continue
        values = np.asarray(box, dtype=np.float64)
        if values.shape not in ((6,), (9,)):
            raise ValueError(f"{name}[{number}] must have six or nine numbers, not shape {values.shape}.")
        if np.isfinite(values).all():
            rows[number, 6:] = 0.0
            rows[number, : len(values)] = values
    return rows


def _iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """IoU ``[n]`` of pairs of ``[n, 9]`` boxes; 0 for NaN boxes."""
    return box_iou(torch.from_numpy(a), torch.from_numpy(b)).numpy()


def _closeness(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Negative distance ``[n]`` of the centres in metres; -inf for NaN boxes."""
    distance = np.linalg.norm(a[:, :3] - b[:, :3], axis=1)
    return -np.where(np.isnan(distance), np.inf, distance)
