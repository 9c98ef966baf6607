"""Scores of a predictions file without a model: this project's, or another's joined with a prepared data set."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from w2r2_ds.config.schema import DataConfig
from w2r2_ds.data.dataset import PreparedSet
from w2r2_ds.data.sources.validation import validate
from w2r2_ds.evaluation.datasets import all_samples, describe_sets, find_sets
from w2r2_ds.evaluation.predictions.importers import (
    BOX_TOLERANCE,
    ImportedPrediction,
    PredictionRow,
    find_format,
    read_lines,
    read_predictions,
)
from w2r2_ds.evaluation.predictions.record import record_of
from w2r2_ds.evaluation.protocols.records import AnswerRecord, RecordFields
from w2r2_ds.evaluation.protocols.registry import find_protocol, protocols_of
from w2r2_ds.evaluation.scoring import check_records, choose_protocols, read_boxes, score_records, task_of
from w2r2_ds.types.sample import Sample
from w2r2_ds.utils.hashing import file_sha256


def score_file(
    file: Path,
    format_name: str = "ours",
    data: Path | None = None,
    root: Path | None = None,
    task: str | None = None,
    protocols: Sequence[str] = (),
    proposals: Path | None = None,
    out: Path | None = None,
) -> dict[str, Any]:
    """Scores of a predictions file.

    Args:
        file: JSON Lines.
        format_name: ours, vgllm or video3dllm.
        data: prepared folder of the items; required for files of other projects.
        root: data root that `data` may be relative to.
        task: raises an error if the answers are of another task.
        protocols, proposals: as for ``evaluate``.
        out: folder for ``scores-NAME.json`` of ``predictions-NAME.jsonl``; nothing is written without it.

    Returns:
        ``file``, ``sha256``, ``format``, ``task``, ``data``, ``samples``, ``missing`` (items without a prediction),
        ``unmatched`` (predictions of unknown items), ``repeated`` (lines about an item of an earlier line),
        ``protocols``.

    Raises:
        ValueError: a line lacks a field (names file, line and field), or two predictions of one item differ.
    """
    boxes = read_boxes(proposals)
    counts, sets = {"unmatched": 0, "repeated": 0}, list[PreparedSet]()
    if data is not None:
        # Scoring reads no images: the root only resolves a relative path of the folder.
        sets = find_sets(DataConfig(root=str(root or DataConfig().root)), task, data)
        row = find_format(format_name, sets[0].task)
        records, counts = join(list(all_samples(sets)), read_predictions(file, row), row)
    elif format_name != "ours":
        raise ValueError(
            f"Predictions in the format {format_name} lack the annotations; name their data set by --data."
        )
    else:
        records = read_own_records(file, protocols, boxes is not None)
        if task not in (None, task_of(records)):
            raise ValueError(f"{file} holds answers of {task_of(records)}, not {task}; correct --task or --score_only.")
    scores = {
        "file": str(file),
        "sha256": file_sha256(file),
        "format": format_name,
        "task": records[0]["task"] if records else task,
        "data": describe_sets(sets),
        "samples": len(records),
        "missing": sum(record["text"] is None for record in records),
        **counts,
        "protocols": score_records(records, protocols, boxes),
    }
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        name = file.stem.removeprefix("predictions-")
        (out / f"scores-{name}.json").write_text(json.dumps(scores, indent=2) + "\n")
    return scores


def read_own_records(file: Path, protocols: Sequence[str], proposals: bool) -> list[AnswerRecord]:
    """Records of this project's own file, with the fields that the requested protocols read.

    Raises:
        ValueError: a field is missing or has another type (names file, line and field), or a protocol cannot score
            these records.
    """
    lines = read_lines(file)
    common = TypeAdapter(RecordFields)
    for where, values in lines:
        task = validate(common, values, where).task
        try:
            protocols_of(task)
        except ValueError as error:
            raise ValueError(f"{where}: field 'task': {error}") from None
    records: list[AnswerRecord] = [values for _, values in lines]
    check_records(records)
    # Fields that only some tasks need are checked by the model of the protocols that read them.
    for model in {find_protocol(name).record_model for name in choose_protocols(protocols, records, proposals)}:
        adapter = TypeAdapter(model)
        for where, values in lines:
            validate(adapter, values, where)
    return records


def join(
    samples: Sequence[Sample], predictions: Sequence[ImportedPrediction], row: type[PredictionRow]
) -> tuple[list[AnswerRecord], dict[str, int]]:
    """Records of all samples, in their order, with the predictions that belong to them.

    Returns:
        The records, and the number of predictions of unknown samples (``unmatched``) and of repeated lines
        (``repeated``).

    Raises:
        ValueError: two predictions of one sample differ, or a prediction answers another question than the sample's.
    """
    by_key: defaultdict[Hashable, list[int]] = defaultdict(list)
    for index, sample in enumerate(samples):
        by_key[row.key_of(sample)].append(index)
    taken: dict[int, ImportedPrediction] = {}
    counts = {"unmatched": 0, "repeated": 0}
    for each in predictions:
        # Keys need not be unique: several objects may have equal descriptions. The first free sample is taken.
        matching = [index for index in by_key.get(each.key, ()) if _near(samples[index], each)]
        free = next((index for index in matching if index not in taken), None)
        if free is not None:
            _check_same_question(samples[free], each)
            taken[free] = each
        elif not matching:
            counts["unmatched"] += 1
        elif each.text in [taken[index].text for index in matching]:
            counts["repeated"] += 1
        else:
            raise ValueError(
                f"{each.where} has another prediction of {samples[matching[0]].id} than {taken[matching[0]].where}; "
                "remove one of the two."
            )
    return [_record(sample, taken.get(index), row.form) for index, sample in enumerate(samples)], counts


def _near(sample: Sample, prediction: ImportedPrediction) -> bool:
    if prediction.near is None:
        return True
    assert sample.target is not None, "samples of ScanRefer have a target"
    return bool(np.abs(sample.target.box[:6] - prediction.near).max() <= BOX_TOLERANCE)


def _check_same_question(sample: Sample, prediction: ImportedPrediction) -> None:
    """Raise ValueError if the file has another question or other frames than the sample."""
    record = record_of(sample, None) if prediction.asked else {}
    for name, value in prediction.asked.items():
        if name in record and record[name] != value:
            raise ValueError(
                f"{prediction.where}: field {name!r} differs from that of {sample.id} in --data, so the answer belongs "
                "to another question or to other frames; name the folder that it was generated from, or omit --data."
            )


def _record(sample: Sample, prediction: ImportedPrediction | None, form: str | None) -> AnswerRecord:
    record = record_of(sample, None if prediction is None else prediction.text)
    if form is not None:
        record |= {"form": form, "cam_to_world": sample.cam_to_world.tolist(), "box": None}
    return record if prediction is None else record | prediction.changes
