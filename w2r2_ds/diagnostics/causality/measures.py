"""Geometric causality: how far answers move when only the geometry changes, against how far they should.

An intervention do(F3D) changes the geometry of a sample and keeps its pixels. A model that reads a number of its box
from the geometry moves it by the expected change x; a model that ignores the geometry does not move it (y = 0).

    slope        sum(x y) / sum(x^2), the least-squares line through the origin: 0 ignores the geometry, 1 follows it
    correlation  Pearson's, of y with x: whether the movement has a system, with any slope
    follows      share of answers that are nearer to the expected number than to the original one

The arrays come from a model (``interventions.py``), or from any function whose answer is known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from w2r2_ds.diagnostics.bootstrap import Estimate, Ratio, SceneBootstrap

NUMBERS = ("x", "y", "z", "size_x", "size_y", "size_z", "a0", "a1", "a2")
"""Numbers of a box ``[9]``: centre and size in metres, ZXY angles in radians."""
ROUNDING = 1e-9
"""Largest rounding error of an expected change of exactly one unit of the last decimal."""
CENTRE = "centre"


@dataclass(frozen=True)
class Answers:
    """Boxes before and after interventions, one row per sample and intervention.

    A row of NaN in `after` is an answer that cannot be compared with that before: it has no box, or one in the camera
    of another frame. NaN in a column of all arrays is a number that the answers do not have.

    Attributes:
        scenes: scene of every row.
        before: ``[rows, 9]`` float64 answers to the sample's own geometry.
        after: ``[rows, 9]`` float64 answers to the changed geometry.
        expected: ``[rows, 9]`` float64 answers before, moved as the geometry was.
    """

    scenes: Sequence[str]
    before: np.ndarray
    after: np.ndarray
    expected: np.ndarray


def measure_causality(answers: Answers, resamples: int = 2000, seed: int = 0, decimals: int = 2) -> dict[str, Any]:
    """Slope, correlation and share of following answers of every number of the box, with intervals over scenes.

    Args:
        answers: at least one row.
        resamples: resamples of the bootstrap.
        seed: seed of the bootstrap.
        decimals: digits after the decimal point of the answers. Rounding hides an expected change below one unit of the
            last one, so that a number with such a change does not count.

    Returns:
        ``rows`` and ``compared`` (rows whose answers can be compared), ``unchanged`` (share of the compared rows whose
        numbers are all equal), and ``numbers``: name -> ``rows`` (compared rows whose expected change is at least
        one unit of the last decimal, in metres or radians), ``slope``, ``correlation``, ``follows`` (each ``value``,
        ``low``, ``high``, ``reason``). ``centre`` has only ``follows``, by the distance of the centres.
    """
    least = 10.0**-decimals
    x, y = _change(answers.expected, answers.before), _change(answers.after, answers.before)
    used = ~np.isnan(x).all(axis=0)  # [9], the numbers that the answers have
    # Without any box before the change there is nothing to compare.
    compared = ~np.isnan(y[:, used]).any(axis=1) & used.any()
    unchanged = (y[compared][:, used] == 0).all(axis=1)
    numbers: dict[str, dict[str, Any]] = {}
    for index in np.flatnonzero(used):
        moved = compared & (np.abs(x[:, index]) >= least - ROUNDING)
        numbers[NUMBERS[index]] = _measures(answers, moved, x[:, index], y[:, index], least, resamples, seed)
    distance = np.linalg.norm(x[:, :3], axis=1)
    moved = compared & (distance >= least - ROUNDING)
    nearer = np.linalg.norm(y[:, :3] - x[:, :3], axis=1) < np.linalg.norm(y[:, :3], axis=1)
    follows = _share(answers, moved, nearer, least, resamples, seed)
    numbers[CENTRE] = {"rows": int(moved.sum()), "follows": asdict(follows)}
    return {
        "rows": len(x),
        "compared": int(compared.sum()),
        "unchanged": float(unchanged.mean()) if len(unchanged) else None,
        "numbers": numbers,
    }


def _measures(
    answers: Answers, moved: np.ndarray, x: np.ndarray, y: np.ndarray, least: float, resamples: int, seed: int
) -> dict[str, Any]:
    """Measures of one number.

    Args:
        answers: scenes of the rows.
        moved: ``[rows]`` bool, the rows that count.
        x: ``[rows]`` expected change of the number.
        y: ``[rows]`` change of the number.
        least: smallest expected change that counts.
        resamples: resamples of the bootstrap.
        seed: seed of the bootstrap.
    """
    rows: dict[str, Any] = {"rows": int(moved.sum())}
    follows = _share(answers, moved, np.abs(y - x) < np.abs(y), least, resamples, seed)
    if not moved.any():
        none = Estimate(None, reason=f"no expected change of at least {least:g}")
        return rows | dict.fromkeys(("slope", "correlation", "follows"), asdict(none))
    bootstrap = _bootstrap(answers, moved, resamples, seed)
    x, y = x[moved], y[moved]
    slope = bootstrap.score(Ratio(x * y, x * x))
    correlation = bootstrap.function_of_sums(_pearson, np.ones(len(x)), x, y, x * x, y * y, x * y)
    return rows | {"slope": asdict(slope), "correlation": asdict(correlation), "follows": asdict(follows)}


def _share(answers: Answers, moved: np.ndarray, hits: np.ndarray, least: float, resamples: int, seed: int) -> Estimate:
    """Share of the rows `moved` that are hits."""
    if not moved.any():
        return Estimate(None, reason=f"no expected change of at least {least:g}")
    chosen = hits[moved].astype(np.float64)
    return _bootstrap(answers, moved, resamples, seed).score(Ratio(chosen, np.ones(len(chosen))))


def _bootstrap(answers: Answers, moved: np.ndarray, resamples: int, seed: int) -> SceneBootstrap:
    """Bootstrap over the scenes of some rows."""
    return SceneBootstrap([answers.scenes[index] for index in np.flatnonzero(moved).tolist()], resamples, seed)


def _change(boxes: np.ndarray, before: np.ndarray) -> np.ndarray:
    """Difference of boxes ``[rows, 9]``; angles in [-pi, pi)."""
    difference = np.asarray(boxes, dtype=np.float64) - before
    difference[:, 6:] = (difference[:, 6:] + np.pi) % (2 * np.pi) - np.pi
    # The remainder adds rounding errors of 1e-16 to equal angles.
    difference[:, 6:][np.abs(difference[:, 6:]) < 1e-12] = 0.0
    return difference


def _pearson(*sums: np.ndarray, axis: int) -> np.ndarray:
    """Pearson's correlation from the sums of 1, x, y, x x, y y and x y per scene."""
    n, x, y, xx, yy, xy = (part.sum(axis=axis) for part in sums)
    variances = np.maximum(n * xx - x * x, 0) * np.maximum(n * yy - y * y, 0)
    # A rounding error of a variance of 0 would give a correlation of noise.
    defined = (n * xx - x * x > 1e-12 * n * xx) & (n * yy - y * y > 1e-12 * n * yy)
    result: np.ndarray = np.where(defined, (n * xy - x * y) / np.sqrt(variances), np.nan)
    return result


def summary(measures: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Name and measures of the numbers that an intervention moves."""
    return [(name, each) for name, each in measures["numbers"].items() if each["rows"]]
