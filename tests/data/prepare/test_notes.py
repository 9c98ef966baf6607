"""Notes of prepared data sets: what runs and score files print about unseen and skipped items."""

from __future__ import annotations

import json
from pathlib import Path

from hand_scene import SCENE, entry, write_annotations, write_proposals
from w2r2_ds.data.frames.selection import FrameOptions
from w2r2_ds.data.mixture import Mixture
from w2r2_ds.data.prepare.notes import preparation_notes
from w2r2_ds.data.prepare.pipeline import prepare
from w2r2_ds.data.prepared_set import PreparedSet
from w2r2_ds.data.tasks.base import TaskOptions
from w2r2_ds.evaluation.predictions.record import record_of
from w2r2_ds.evaluation.predictions.rescore import score_file

TWO = FrameOptions("uniform", 2)


def prepared(root: Path, options: TaskOptions, name: str) -> PreparedSet:
    done = prepare(root, options, root / "prepared" / name, skip_without_box=True, quiet=True)
    return PreparedSet(done.folder, root)


def test_unseen_items_stay_in_the_denominator_and_skipped_ones_do_not(root: Path) -> None:
    for split in ("train", "val"):
        write_annotations(root, [entry(), entry(3, "lamp"), entry(97, "floor")], split)
    validation = prepared(root, TaskOptions("scanrefer", "val", frames=TWO, visibility="depth"), "val")
    assert len(validation) == 2, "the hidden lamp is a sample"
    *notes, lost = preparation_notes(validation, root)
    assert notes == [
        "prepared/val: 1 of 2 items are seen by no frame; they stay in the denominator of the scores",
        "prepared/val: 1 items were skipped in the preparation (1 no_box); they are not in the denominator of the "
        "scores",
    ]
    assert lost.startswith("prepared/val: skipped input: 1 frames without a valid pose")
    training = prepared(root, TaskOptions("scanrefer", "train", frames=TWO, visibility="depth"), "train")
    assert preparation_notes(training, root)[:2] == [
        "prepared/train: 1 of 2 items are seen by no frame",
        "prepared/train: 2 items were skipped in the preparation (1 no_box, 1 no_visible_frame)",
    ]
    mixture = Mixture([training, validation, list(training)], [1.0] * 3, [0] * 3)
    assert preparation_notes(mixture, root) == [
        *preparation_notes(training, root),
        *preparation_notes(validation, root),
    ], "another source of samples has none"


def test_the_score_file_has_the_notes(root: Path) -> None:
    write_annotations(root, [entry(), entry(97, "floor", 1)], "val")
    write_proposals(root, [[2, 5, 1, 1, 1, 0], [2, 5, 1, 1, 1, 1]])
    captions = prepared(root, TaskOptions("scan2cap", "val", frames=TWO), "val")
    file = root / "p.jsonl"
    file.write_text("".join(json.dumps(record_of(sample, "A chair.")) + "\n" for sample in captions))
    scores = score_file(file, data=captions.folder, root=root, out=root / "scores")
    assert scores["notes"] == preparation_notes(captions, root)
    assert any("1 no_box" in note for note in scores["notes"])
    assert any("skipped input: 1 " in note and SCENE in note for note in scores["notes"]), "the broken proposal"
    assert json.loads((root / "scores" / "scores-p.json").read_text())["notes"] == scores["notes"]
