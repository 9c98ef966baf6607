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

Measure = Literal["iou", "centre"]
Label = Literal["truth", "cue", "neither", "unscored"]
Box = Sequence[float] | np.ndarray
"""World box: six numbers (axis-aligned: centre, size; metres) or nine (with ZXY angles; radians)."""

THRESHOLDS: dict[Measure, float] = {"iou": 0.25, "centre": 0.5}
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
    predicted: Sequence[Box | None],
    truth: Sequence[Box],
    cue: Sequence[Box | None],
    measure: Measure = "iou",
    threshold: float | None = None,
) -> CueShares:
    """Classify answers by the box that they agree with.

    ``iou``: a box agrees if its IoU is at least `threshold`; of truth and cue, the one with the larger IoU counts.
    Items whose truth and cue have such an IoU with each other are not scored. ``centre``: the same with the distance of
    the centres, which must be at most `threshold`; it needs no correct size.

    Args:
        predicted: world boxes of the answers; None for an answer without a box.
        truth: annotated world boxes.
        cue: world boxes of the cues; None for an item without a cue, which is not scored.
        measure: ``iou`` or ``centre``.
        threshold: IoU, or distance in metres; default: `THRESHOLDS`.

    Raises:
        ValueError: the lists have different lengths, a box has not six or nine numbers or is not finite (predictions
            may be), or the measure is unknown.
    """
    if not len(predicted) == len(truth) == len(cue):
        raise ValueError(f"There are {len(predicted)} predictions, {len(truth)} true boxes and {len(cue)} cues.")
    if measure not in THRESHOLDS:
        raise ValueError(f"measure is {measure!r}; it must be iou or centre.")
    if not predicted:
        return CueShares((), 0, np.nan, np.nan, np.nan, np.nan)
    limit = THRESHOLDS[measure] if threshold is None else threshold
    p, t, c = _boxes(predicted, "predicted"), _boxes(truth, "truth"), _boxes(cue, "cue")
    if np.isnan(t).any():
        raise ValueError("Every item needs a finite true box.")
    # Agreement in [-inf, inf], larger is closer; NaN boxes agree with nothing.
    agreement = _iou if measure == "iou" else _closeness
    needed = limit if measure == "iou" else -limit
    with_truth, with_cue, between = agreement(p, t), agreement(p, c), agreement(t, c)
    has_cue = np.isfinite(c).all(axis=1)
    labels: list[Label] = [
        "unscored"
        if not known or overlap >= needed
        else "neither"
        if max(one, other) < needed
        else "truth"
        if one >= other
        else "cue"
        for known, overlap, one, other in zip(has_cue, between, with_truth, with_cue, strict=True)
    ]
    counts = Counter(labels)
    scored = len(labels) - counts["unscored"]
    truth_share, cue_share, neither = (
        counts[label] / scored if scored else np.nan for label in ("truth", "cue", "neither")
    )
    usable = np.array([label != "unscored" for label in labels]) & np.isfinite(p).all(axis=1)
    offset, line = (p - t)[usable, :3], (c - t)[usable, :3]
    positions = (offset * line).sum(axis=1) / np.maximum((line**2).sum(axis=1), 1e-12)
    position = float(np.median(positions)) if len(positions) else np.nan
    return CueShares(tuple(labels), scored, truth_share, cue_share, neither, position)


def _boxes(boxes: Sequence[Box | None], name: str) -> np.ndarray:
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
