"""Scores of a predictions file, without a model: this project's, or another's joined with a prepared data set."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from w2r2_ds.config.schema import DataConfig
from w2r2_ds.evaluation.datasets import all_samples, describe_sets, find_sets
from w2r2_ds.evaluation.predictions.importers import NEAR, Foreign, Format, find_format
from w2r2_ds.evaluation.predictions.jsonl import Line, read_lines
from w2r2_ds.evaluation.predictions.record import FORMS, record_of
from w2r2_ds.evaluation.protocols.scanrefer import GROUPS
from w2r2_ds.evaluation.scoring import read_boxes, score_records
from w2r2_ds.types.sample import Sample
from w2r2_ds.utils.sanitize import CONTROL


def score_file(
    file: Path,
    form: str = "ours",
    data: Path | None = None,
    root: Path | None = None,
    task: str | None = None,
    protocols: Sequence[str] = (),
    proposals: Path | None = None,
    out: Path | None = None,
) -> dict[str, Any]:
    """Scores of a predictions file.

    Args:
        file: JSON lines.
        form: ours, vgllm or video3dllm.
        data: prepared folder of the items; needed for other projects' files.
        root: data root that `data` may be relative to.
        task: what must be in the data set, if given.
        protocols, proposals: as for ``evaluate``.
        out: folder for ``scores-NAME.json``, where predictions-NAME.jsonl is the file; not written without.

    Returns:
        ``file``, ``sha256``, ``format``, ``task``, ``data``, ``samples``, ``missing`` (items without a prediction),
        ``unmatched`` (predictions of no item), ``repeated`` (lines with an item that an earlier line
        has), ``protocols``.

    Raises:
        ValueError: a line lacks a field (names file, line and field), or two predictions of one item differ.
    """
    lines = list(read_lines(file))
    counts = {"unmatched": 0, "repeated": 0}
    sets = []
    if data is not None:
        # Scores need no pixels, so the root is only where the folder may lie.
        sets = find_sets(DataConfig(root=str(root or DataConfig().root)), task, data)
        way = find_format(form, sets[0].task)
        records, counts = join(list(all_samples(sets)), [way.read(line) for line in lines], way)
    elif form != "ours":
        raise ValueError(
            f"Predictions in the format {form} name no items; say with --data what they are predictions of."
        )
    else:
        records = [complete_record(line) for line in lines]
        if task is not None and any(record["task"] != task for record in records):
            raise ValueError(f"{file} holds other answers than {task}'s; correct --task or --score_only.")
    scores = {
        "file": str(file),
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "format": form,
        "task": records[0]["task"] if records else task,
        "data": describe_sets(sets),
        "samples": len(records),
        "missing": sum(record["text"] is None for record in records),
        **counts,
        "protocols": score_records(records, protocols, read_boxes(proposals)),
    }
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        name = file.stem.removeprefix("predictions-")
        (out / f"scores-{name}.json").write_text(json.dumps(scores, indent=2) + "\n")
    return scores


def join(
    samples: Sequence[Sample], predictions: Sequence[Foreign], way: Format
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Records of all samples, in their order, with the predictions that belong to them.

    Returns:
        the records, and how many predictions belong to no sample (``unmatched``) or repeat an earlier line
        (``repeated``).

    Raises:
        ValueError: two predictions of one sample differ, or one was asked otherwise than the sample asks.
    """
    by_key: defaultdict[Hashable, list[int]] = defaultdict(list)
    for index, sample in enumerate(samples):
        by_key[way.key(sample)].append(index)
    taken: dict[int, Foreign] = {}
    counts = {"unmatched": 0, "repeated": 0}
    for each in predictions:
        fitting = [index for index in by_key.get(each.key, ()) if _near(samples[index], each)]
        free = next((index for index in fitting if index not in taken), None)
        if free is not None:
            _refuse_other_question(samples[free], each)
            taken[free] = each
        elif not fitting:
            counts["unmatched"] += 1
        elif each.text in [taken[index].text for index in fitting]:
            counts["repeated"] += 1
        else:
            raise ValueError(
                f"{each.line.where} predicts {samples[fitting[0]].id} again, otherwise than "
                f"{taken[fitting[0]].line.where}; leave one of the two out."
            )
    return [_record(sample, taken.get(index), way.form) for index, sample in enumerate(samples)], counts


def _near(sample: Sample, prediction: Foreign) -> bool:
    if prediction.near is None:
        return True
    assert sample.target is not None, "it is about an object"
    return bool(np.abs(sample.target.box[:6] - prediction.near).max() <= NEAR)


def _refuse_other_question(sample: Sample, prediction: Foreign) -> None:
    mine = record_of(sample, None) if prediction.asked else {}
    for name, value in prediction.asked.items():
        if name in mine and mine[name] != value:
            raise ValueError(
                f"{prediction.line.where}: field {name!r} is not what --data has for {sample.id}, so this answers "
                "another question or is about other frames; name the folder it was made with, or leave --data out."
            )


def _record(sample: Sample, prediction: Foreign | None, form: str | None) -> dict[str, Any]:
    record = record_of(sample, None if prediction is None else prediction.text)
    if form is not None:
        record |= {"form": form, "cam_to_world": sample.cam_to_world.tolist(), "box": None}
    return record if prediction is None else record | prediction.changes


_CHOICES = {"form": FORMS, "target.group": GROUPS, "target.group_nyu40": GROUPS}
_NEEDED = {
    "scanrefer": (
        *(f"target.{name}" for name in ("box", "object_id", "object_name", "ann_id", "scannet_class")),
        *_CHOICES,
    ),
    "scan2cap": ("target.box", "target.object_id", "target.object_name", "target.described", "references"),
    "scanqa": ("references",),
    "detection": ("objects",),
}


def complete_record(line: Line) -> dict[str, Any]:
    """A record of this project's own, checked for what its scores need.

    Raises:
        ValueError: a field is missing or of another type.
    """
    for name in ("id", "task", "scene_id"):
        if CONTROL.search(line.get(name, str)):
            raise ValueError(f"{line.where}: field {name!r} is {line.get(name, str)!r}, with a control character.")
    task = line.get("task", str)
    if task not in _NEEDED:
        raise ValueError(f"{line.where}: field 'task' is {task!r}; it is one of {', '.join(_NEEDED)}.")
    line.get("text", (str, type(None)))
    for name in _NEEDED[task]:
        line.get(name, object)
        if name in _CHOICES and line.get(name, str) not in _CHOICES[name]:
            raise ValueError(
                f"{line.where}: field {name!r} is {line.get(name, str)!r}, not {' or '.join(_CHOICES[name])}."
            )
    if "target.box" in _NEEDED[task]:
        line.numbers("target.box", (9,))
    if task == "scan2cap" and line.get("target.described", object) is not None:
        line.numbers("target.described", (6,))
    if line.values.get("form") == "camera":
        line.numbers("cam_to_world", (-1, 4, 4))
    if "references" in _NEEDED[task]:
        for each in line.members("references"):
            each.get("text", str)
            each.get("words", list)
    if "objects" in _NEEDED[task]:
        for each in line.members("objects"):
            each.get("label", str)
            each.numbers("box", (9,))
    return dict(line.values)
