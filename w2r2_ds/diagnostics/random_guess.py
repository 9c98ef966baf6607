"""Answers of a random guess: the label of another sample, drawn at random.

Such a guess has the format and the distribution of the labels, but nothing of its own sample: neither frames nor
question. The score of the model without any image is above it as far as the question alone helps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from w2r2_ds.config.schema import DataConfig
from w2r2_ds.data.prepared_set import PreparedSet
from w2r2_ds.data.tasks.parsing import AnswerError, parse_grounding
from w2r2_ds.evaluation.predictions.record import record_of
from w2r2_ds.evaluation.protocols.records import AnswerRecord, enclosing_box
from w2r2_ds.types.sample import Sample

MAX_FRAMES = 10**6
"""Upper bound of the number of frames of a sample, to parse a label without its frames."""


@dataclass(frozen=True)
class Label:
    """The label of one sample.

    Attributes:
        scene_id: scene of the sample.
        text: text of the label.
        form: coordinates of its box, see ``predictions/record.py``; None if it is not a box.
        frame: frame index in the label; -1 if it has none.
        box: world box ``[6]`` (centre, size; metres) of its target; None without a target.
    """

    scene_id: str
    text: str
    form: str | None
    frame: int
    box: tuple[float, ...] | None


def read_labels(samples: Iterable[Sample]) -> list[Label]:
    """The labels of samples; samples without one (their target is in no frame) are skipped."""
    return [_label(sample) for sample in samples if sample.answer]


def training_labels(config: DataConfig, task: str) -> list[Label]:
    """Labels of the run's training sets of a task; empty if there is none on this machine."""
    folders = [Path(config.root) / source.path for source in config.train]
    found = [PreparedSet(folder, config.root) for folder in folders if folder.is_dir()]
    return [label for each in found if each.task == task for label in read_labels(each)]


def _label(sample: Sample) -> Label:
    form, frame = record_of(sample, None).get("form"), -1
    if form == "camera":
        try:
            frame = parse_grounding(sample.answer, MAX_FRAMES).frame
        except AnswerError as error:
            raise ValueError(f"The label of sample {sample.id} is not a box in a frame's camera: {error}") from error
    box = None if sample.target is None else tuple(enclosing_box(sample.target.box.tolist()))
    return Label(sample.scene_id, sample.answer, form, frame, box)


def random_guesses(
    records: Sequence[AnswerRecord], labels: Sequence[Label], draws: int, seed: int
) -> list[list[AnswerRecord]]:
    """Draw a label of another scene for every record, several times.

    Args:
        records: one record per sample.
        labels: labels to draw from. Those of the record's own scene are not drawn: a description of the same object
            has the correct answer.
        draws: number of draws.
        seed: seed of the draws.

    Returns:
        Per draw, the records with the drawn answers.

    Raises:
        ValueError: no label fits a record: all are of its scene, of another answer format, or of a frame that the
            sample does not have.
    """
    rng = np.random.default_rng(seed)
    candidates: dict[tuple[str, str | None, int], np.ndarray] = {}
    drawn: list[list[AnswerRecord]] = [[] for _ in range(draws)]
    for record in records:
        form, frames = record.get("form"), len(record.get("cam_to_world") or ())
        key = record["scene_id"], form, frames
        if key not in candidates:
            candidates[key] = np.array(
                [index for index, label in enumerate(labels) if _fits(label, *key)], dtype=np.int64
            )
        if not len(candidates[key]):
            raise ValueError(f"no label of another scene has the answer format of {record['id']}")
        for guesses, index in zip(drawn, rng.choice(candidates[key], draws), strict=True):
            guesses.append({**record, **_answer(labels[index], form)})
    return drawn


def most_frequent(labels: Sequence[Label]) -> str | None:
    """Text of the most frequent label, of equally frequent ones the first in the alphabet; None if all are different.

    If all labels are different, as captions and boxes usually are, the most frequent one means nothing.
    """
    counts = Counter(label.text for label in labels)
    text = min(counts, key=lambda answer: (-counts[answer], answer), default=None)
    return text if text is not None and counts[text] > 1 else None


def _fits(label: Label, scene_id: str, form: str | None, frames: int) -> bool:
    """Whether a label can be an answer to a sample of this scene, answer format and number of frames."""
    if label.scene_id == scene_id:
        return False
    if form == "box":  # a file of another project with boxes: any target is such a box
        return label.box is not None
    return label.form == form and label.frame < max(frames, 1)


def _answer(label: Label, form: str | None) -> dict[str, Any]:
    """The fields of a record that a label replaces."""
    fields: dict[str, Any] = {"text": label.text, "tokens": []}
    if form == "box":
        assert label.box is not None, "checked by `_fits`"
        fields["box"] = list(label.box)
    return fields
