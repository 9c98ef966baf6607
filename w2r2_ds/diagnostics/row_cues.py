"""Shares of the answers of every row that follow the known 2D cue of a shifted split (``shortcut_cue.py``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from w2r2_ds.data.prepared_set import PreparedSet
from w2r2_ds.data.sources.shortcut_cues import ShortcutCue, cues_file, read_cues
from w2r2_ds.data.tasks.parsing import AnswerError, parse_grounding
from w2r2_ds.diagnostics.bootstrap import Estimate, Ratio, SceneBootstrap
from w2r2_ds.diagnostics.shortcut_cue import THRESHOLDS, cue_shares
from w2r2_ds.diagnostics.table1 import Row
from w2r2_ds.evaluation.protocols.records import AnswerRecord, answer_world_box
from w2r2_ds.types.sample import Sample


def cues_of(sets: Sequence[PreparedSet]) -> dict[str, ShortcutCue]:
    """Sample id -> cue, of the sets of shifted splits; empty for other sets."""
    cues: dict[str, ShortcutCue] = {}
    for each in sets:
        file = cues_file(Path(each.root), str(each.manifest.get("options", {}).get("split")))
        if each.task == "scanrefer" and file.is_file():
            cues |= read_cues(file)
    return cues


def cue_results(
    rows: Sequence[Row], samples: Sequence[Sample], cues: Mapping[str, ShortcutCue], resamples: int, seed: int
) -> dict[str, Any]:
    """Shares of every row, by IoU and by the distance of the centres.

    Args:
        rows: rows of Table 1.
        samples: samples of the rows, in their order.
        cues: from `cues_of`; samples without a cue are not scored.
        resamples: resamples of the bootstrap over scenes.
        seed: its seed.

    Returns:
        Name of the row -> measure (``iou``, ``centre``) -> ``scored`` (number of answers, of all draws), and ``truth``,
        ``cue`` and ``neither``, each ``value``, ``low``, ``high``, ``reason``.
    """
    return {
        row.name: {measure: _shares(row, samples, cues, measure, resamples, seed) for measure in THRESHOLDS}
        for row in rows
    }


def _shares(
    row: Row, samples: Sequence[Sample], cues: Mapping[str, ShortcutCue], measure: Any, resamples: int, seed: int
) -> dict[str, Any]:
    """Shares of one row by one measure."""
    labels: list[str] = []
    scenes: list[str] = []
    for records in row.draws:
        known = [(record, sample) for record, sample in zip(records, samples, strict=True) if record["id"] in cues]
        predicted = [answer_world_box(record) for record, _ in known]
        truth = [cues[record["id"]].truth for record, _ in known]
        found = [_cue_box(record, sample, cues[record["id"]]) for record, sample in known]
        labels += cue_shares(predicted, truth, found, measure).labels
        scenes += [str(record["scene_id"]) for record, _ in known]
    scored = np.array([label != "unscored" for label in labels], dtype=bool)
    result: dict[str, Any] = {"scored": int(scored.sum())}
    for name in ("truth", "cue", "neither"):
        hits = np.array([label == name for label in labels], dtype=np.float64)[scored]
        if not len(hits):
            result[name] = asdict(Estimate(None, reason="no answer whose truth and cue can be told apart"))
            continue
        bootstrap = SceneBootstrap([scene for scene, kept in zip(scenes, scored, strict=True) if kept], resamples, seed)
        result[name] = asdict(bootstrap.score(Ratio(hits, np.ones(len(hits)))))
    return result


def _cue_box(record: AnswerRecord, sample: Sample, cue: ShortcutCue) -> np.ndarray | None:
    """World box of the cue in the coordinates that the answer has; None without one."""
    numbers = [int(path.stem) for path in sample.frames]
    if record["form"] != "camera":
        return cue.world_box(numbers)
    try:
        frame = parse_grounding(record["text"] or "", len(numbers)).frame
    except AnswerError:  # it follows neither; any cue box of the object does
        return cue.world_box(numbers)
    return cue.camera_box(numbers[frame])
