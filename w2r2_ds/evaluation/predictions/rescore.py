"""Scores of a predictions file, without a model: this project's, or another's joined with a prepared data set."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from w2r2_ds.config.schema import DataConfig
from w2r2_ds.data.sources.validation import validate
from w2r2_ds.evaluation.datasets import all_samples, describe_sets, find_sets
from w2r2_ds.evaluation.predictions.importers import NEAR, Foreign, Format, find_format
from w2r2_ds.evaluation.predictions.jsonl import Line, read_lines
from w2r2_ds.evaluation.predictions.record import record_of
from w2r2_ds.evaluation.protocols.records import AnswerRecord, RecordFields
from w2r2_ds.evaluation.protocols.registry import find_protocol, protocols_of
from w2r2_ds.evaluation.scoring import check_records, choose_protocols, read_boxes, score_records
from w2r2_ds.types.sample import Sample


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
    counts, boxes = {"unmatched": 0, "repeated": 0}, read_boxes(proposals)
    records: list[AnswerRecord] = []
    sets = []
    if data is not None:
        # Scores need no pixels, so the root is only where the folder may lie.
        sets = find_sets(DataConfig(root=str(root or DataConfig().root)), task, data)
        way = find_format(form, sets[0].task)
        joined, counts = join(list(all_samples(sets)), [way.read(line) for line in lines], way)
        records = list(joined)
    elif form != "ours":
        raise ValueError(
            f"Predictions in the format {form} name no items; say with --data what they are predictions of."
        )
    else:
        records = validate_records(lines, protocols, boxes is not None)
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
        "protocols": score_records(records, protocols, boxes),
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


def validate_records(lines: Sequence[Line], protocols: Sequence[str], proposals: bool) -> list[AnswerRecord]:
    """Records of this project's own file, with the fields that the requested protocols read.

    Raises:
        ValueError: a field is missing or has another type (names file, line and field), or `choose_protocols` does.
    """
    common = TypeAdapter(RecordFields)
    tasks = {validate(common, line.values, line.where).task: line.where for line in lines}
    for task, where in tasks.items():
        try:
            protocols_of(task)
        except ValueError as error:
            raise ValueError(f"{where}: field 'task': {error}") from None
    records = [line.values for line in lines]
    check_records(records)
    models = {find_protocol(name).record_model for name in choose_protocols(protocols, records, proposals)}
    for model in models:
        adapter = TypeAdapter(model)
        for line in lines:
            validate(adapter, line.values, line.where)
    return records
