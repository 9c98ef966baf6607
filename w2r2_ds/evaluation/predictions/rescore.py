"""Score a predictions file without a model: this project's, or another project's joined with a prepared data set."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from w2r2_ds.config.schema import DataConfig
from w2r2_ds.data.prepare.notes import preparation_notes
from w2r2_ds.data.prepared_set import PreparedSet
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
from w2r2_ds.evaluation.scoring import (
    are_annotated,
    check_records,
    choose_protocols,
    log_limits,
    read_boxes,
    score_records,
    task_of,
)
from w2r2_ds.types.sample import Sample
from w2r2_ds.utils.files.hashing import file_sha256
from w2r2_ds.utils.files.output_folder import check_writable, make_folder

_Records = tuple[list[AnswerRecord], dict[str, int], list[PreparedSet]]
"""Records, counts of predictions (see `join`), and the data sets that they were joined with."""


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
        format_name: ``ours``, ``vgllm`` or ``video3dllm``.
        data: prepared folder of the items; required for files of other projects.
        root: data root that `data` may be relative to.
        task: task that the answers must be of; None for any.
        protocols: names of scoring protocols; the task's default if empty (`choose_protocols`).
        proposals: file of detected boxes, for ``scanrefer/vgllm_refined``.
        out: folder for ``scores-NAME.json`` of ``predictions-NAME.jsonl``; None to write no file.

    Returns:
        ``file``, ``sha256``, ``format``, ``task``, ``data``, ``samples``, ``missing`` (items without a prediction),
        ``unmatched`` (number of predictions of unknown items), ``repeated`` (number of repeated lines), ``empty``
        (number of failures whose item is unknown; their items are ``missing``), ``notes`` (see `preparation_notes`),
        ``protocols``.

    Raises:
        ValueError: a field is missing or has another type (the message names file, line and field), or two predictions
            of one item differ.
    """
    if out is not None:
        check_writable(out)
    boxes = read_boxes(proposals)
    records, counts, sets = load_records(file, format_name, data, root, task, protocols, boxes is not None)
    data_root = root or DataConfig().root
    is_scored = not records or are_annotated(records)  # without records, scoring raises the error
    scores = {
        "file": str(file),
        "sha256": file_sha256(file),
        "format": format_name,
        "task": records[0]["task"] if records else task,
        "data": describe_sets(sets),
        "samples": len(records),
        "missing": sum(record["text"] is None for record in records),
        **counts,
        "notes": [note for each in sets for note in preparation_notes(each, data_root)],
        "protocols": score_records(records, protocols, boxes) if is_scored else {},
    }
    log_limits(scores, is_scored, file)
    if out is not None:
        make_folder(out)
        name = file.stem.removeprefix("predictions-")
        (out / f"scores-{name}.json").write_text(json.dumps(scores, indent=2) + "\n")
    return scores


def load_records(
    file: Path,
    format_name: str = "ours",
    data: Path | None = None,
    root: Path | None = None,
    task: str | None = None,
    protocols: Sequence[str] = (),
    has_proposals: bool = False,
) -> _Records:
    """The records of a predictions file, joined with a prepared folder if one is given; arguments as `score_file`.

    Raises:
        ValueError: as `score_file`.
    """
    if data is None:
        return _own_records(file, format_name, task, protocols, has_proposals)
    return _joined_records(file, format_name, task, data, root)


def _joined_records(file: Path, format_name: str, task: str | None, data: Path, root: Path | None) -> _Records:
    """Predictions of any format, joined with a prepared folder."""
    # Scoring reads no images: the root only resolves a relative path of the folder.
    sets = find_sets(DataConfig(root=str(root or DataConfig().root)), task, data)
    row = find_format(format_name, sets[0].task)
    records, counts = join(list(all_samples(sets)), read_predictions(file, row), row)
    return records, counts, sets


def _own_records(
    file: Path, format_name: str, task: str | None, protocols: Sequence[str], has_proposals: bool
) -> _Records:
    """Records of this project's format, which contain the annotations."""
    if format_name != "ours":
        raise ValueError(
            f"Predictions in the format {format_name} have no annotations; pass their prepared folder with --data."
        )
    records = read_own_records(file, protocols, has_proposals)
    if task not in (None, task_of(records)):
        raise ValueError(f"{file} holds answers of {task_of(records)}, not {task}; correct --task or --score_only.")
    return records, _no_counts(), []


def read_own_records(file: Path, protocols: Sequence[str], has_proposals: bool) -> list[AnswerRecord]:
    """Read the records of this project's own file and validate the fields that the requested protocols read.

    Args:
        file: JSON Lines.
        protocols: names of protocols, see `choose_protocols`.
        has_proposals: whether detected boxes are given.

    Raises:
        ValueError: a field is missing or has another type (the message names file, line and field), or a protocol
            cannot score these records.
    """
    lines = read_lines(file)
    common = TypeAdapter(RecordFields)
    for location, values in lines:
        task = validate(common, values, location).task
        try:
            protocols_of(task)
        except ValueError as error:
            raise ValueError(f"{location}: field 'task': {error}") from None
    records: list[AnswerRecord] = [values for _, values in lines]
    check_records(records)
    if not are_annotated(records):
        return records
    # Fields that only some protocols read are validated by the models of those protocols.
    for model in {find_protocol(name).record_model for name in choose_protocols(protocols, records, has_proposals)}:
        adapter = TypeAdapter(model)
        for location, values in lines:
            validate(adapter, values, location)
    return records


def join(
    samples: Sequence[Sample], predictions: Sequence[ImportedPrediction], row: type[PredictionRow]
) -> tuple[list[AnswerRecord], dict[str, int]]:
    """Assign predictions to samples.

    Args:
        samples: all samples of the data.
        predictions: predictions of a file, in its order.
        row: model of the file's lines.

    Returns:
        One record per sample, in the order of the samples, and the numbers of predictions of unknown samples
        (``unmatched``), of repeated lines (``repeated``) and of failures of unknown samples (``empty``).

    Raises:
        ValueError: two predictions of one sample differ, or a prediction is of another question or of other frames
            than the sample.
    """
    by_key: defaultdict[Hashable, list[int]] = defaultdict(list)
    for index, sample in enumerate(samples):
        by_key[row.key_of(sample)].append(index)
    assigned: dict[int, ImportedPrediction] = {}  # index of the sample -> its prediction
    counts = _no_counts()
    for prediction in predictions:
        if prediction.key is None:
            counts["empty"] += 1
            continue
        # Keys need not be unique, because several objects may have equal descriptions. Predictions with equal keys are
        # assigned to the samples in order; a further one is a repetition if its text is equal to an assigned one.
        matching = [index for index in by_key.get(prediction.key, ()) if _is_same_object(samples[index], prediction)]
        free = next((index for index in matching if index not in assigned), None)
        if free is not None:
            _check_same_question(samples[free], prediction)
            assigned[free] = prediction
        elif not matching:
            counts["unmatched"] += 1
        elif prediction.text in [assigned[index].text for index in matching]:
            counts["repeated"] += 1
        else:
            first = matching[0]
            raise ValueError(
                f"{prediction.location} has another prediction of {samples[first].id} than {assigned[first].location}; "
                "remove one of the two."
            )
    return [_record(sample, assigned.get(index), row.form) for index, sample in enumerate(samples)], counts


def _no_counts() -> dict[str, int]:
    return {"unmatched": 0, "repeated": 0, "empty": 0}


def _is_same_object(sample: Sample, prediction: ImportedPrediction) -> bool:
    """Whether the prediction's annotated box is that of the sample; true if one of the two has none."""
    if prediction.object_box is None or sample.target is None:  # samples of a test split have no target
        return True
    return bool(np.abs(sample.target.box[:6] - prediction.object_box).max() <= BOX_TOLERANCE)


def _check_same_question(sample: Sample, prediction: ImportedPrediction) -> None:
    """Raise ValueError if the file has another question or other frames than the sample."""
    record = record_of(sample, None) if prediction.required else {}
    for name, value in prediction.required.items():
        if name in record and record[name] != value:
            raise ValueError(
                f"{prediction.location}: field {name!r} differs from that of {sample.id} in --data, so the answer is "
                "of another question or of other frames; pass the folder that it was generated from, or omit --data."
            )


def _record(sample: Sample, prediction: ImportedPrediction | None, form: str | None) -> AnswerRecord:
    """The record of a sample with its prediction, or with a missing one."""
    record = record_of(sample, None if prediction is None else prediction.text)
    if form is not None:
        record |= {"form": form, "cam_to_world": sample.cam_to_world.tolist(), "box": None}
    return record if prediction is None else record | prediction.replaced
