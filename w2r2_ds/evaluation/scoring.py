"""Choose protocols and score answer records; needs neither a model nor images nor annotation files."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from w2r2_ds.data.sources.proposals import read_proposals
from w2r2_ds.data.tasks import base
from w2r2_ds.data.tasks.parsing import AnswerError
from w2r2_ds.evaluation.metrics.captions import MetricValue
from w2r2_ds.evaluation.protocols.records import AnswerRecord, Proposals, check_keys, raise_with_first
from w2r2_ds.evaluation.protocols.registry import Protocol, find_protocol, protocols_of
from w2r2_ds.types.sample import BoxFormat
from w2r2_ds.utils.parallel import listed

logger = logging.getLogger(__name__)

# Keys of a result that hold scores or texts of single items; they are not written into score files.
PER_ITEM = ("items", "candidates", "references", "mask", "items_before_mask")


NOT_SCORED = "not scored (no answers in this split)"


def are_annotated(records: Sequence[AnswerRecord]) -> bool:
    """Whether the records can be scored; False for those of a test split, whose answers are hidden.

    Raises:
        ValueError: some records can be scored and others not.
    """
    hidden = [record["id"] for record in records if not record.get("annotated", True)]
    if len(hidden) < len(records):
        raise_with_first(hidden, "samples have no annotated answers, but others do", "; evaluate the splits separately")
    return not hidden


def log_limits(scores: dict[str, Any], is_scored: bool, predictions: Path) -> None:
    """Log the notes of a score file; add and log that a test split has no answers.

    Args:
        scores: content of the score file, with ``notes``; ``not_scored`` is added if nothing is scored.
        is_scored: result of `are_annotated`.
        predictions: file of the answers.
    """
    for note in scores["notes"]:
        logger.warning("%s", note)
    if not is_scored:
        scores["not_scored"] = NOT_SCORED
        logger.warning("%s: %s", predictions, NOT_SCORED)


def choose_protocols(names: Sequence[str], records: Sequence[AnswerRecord], has_proposals: bool = False) -> list[str]:
    """Full names of the requested protocols, each once.

    Args:
        names: names of protocols, ``task/protocol`` or only the second part; ``all`` for every protocol that can score
            these records; empty for the task's default.
        records: at least one record, all of one task.
        has_proposals: whether detected boxes are given; only then ``all`` includes the protocols that need them.

    Raises:
        ValueError: an unknown protocol, one of another task, or one that cannot score these records.
    """
    task, form = task_of(records), _form(records)
    protocols = protocols_of(task)
    # compatible: can score the coordinates of these answers; available: detected boxes are given too if needed.
    compatible = [protocol for protocol in protocols if form is None or form in protocol.coordinates]
    if not compatible:
        known = ", ".join(f"{protocol.name} ({' or '.join(protocol.coordinates)})" for protocol in protocols)
        raise ValueError(f"No protocol of {task} scores boxes in {form} coordinates; its protocols score {known}.")
    available = [protocol for protocol in compatible if has_proposals or not protocol.needs_proposals]
    if not available and (not names or "all" in names):
        raise ValueError(
            f"The protocols of {task} for these answers ({', '.join(protocol.name for protocol in compatible)}) need "
            "detected boxes; pass their file with --proposals."
        )
    if not names:
        # The protocol for the fewest coordinates is the most specific: vgllm-direct for answers in a frame's camera.
        defaults = [protocol for protocol in available if protocol.default] or available
        return [min(defaults, key=lambda protocol: len(protocol.coordinates)).name]
    if "all" in names:
        return [protocol.name for protocol in available]
    chosen = [find_protocol(name if "/" in name else f"{task}/{name}") for name in names]
    for protocol in chosen:
        if protocol.task != task:
            raise ValueError(f"Protocol {protocol.name} scores {protocol.task}, but these are answers of {task}.")
        if protocol.needs_proposals and not has_proposals:
            raise ValueError(f"Protocol {protocol.name} needs detected boxes; pass their file with --proposals.")
        if protocol not in compatible:
            raise ValueError(
                f"Protocol {protocol.name} scores boxes in {' or '.join(protocol.coordinates)} coordinates, but these "
                f"answers are in {form} coordinates; use {' or '.join(other.name for other in compatible)}."
            )
    return list(dict.fromkeys(protocol.name for protocol in chosen))


def score_records(
    records: Sequence[AnswerRecord],
    protocols: Sequence[str] = (),
    proposals: Proposals | None = None,
    items: bool = False,
) -> dict[str, dict[str, Any]]:
    """Scores of records of one task by one or several protocols.

    Args:
        records: one record per sample; ``text`` is None for a missing prediction, which is a failure.
        protocols: names of protocols, see `choose_protocols`.
        proposals: detected boxes, for protocols that need them.
        items: whether to keep the scores and texts of single items.

    Returns:
        Full name -> result of the protocol's score function, with ``protocol`` replaced by the full name and ``count``,
        ``parsed`` (share of answers that could be parsed) and ``missing`` (records without a prediction) added. A score
        that could not be computed is None, and ``not_computed`` has the reason.

    Raises:
        ValueError: there are no records, two of one sample, records of several tasks, or a protocol cannot score them.
    """
    check_records(records)
    results = {}
    for name in choose_protocols(protocols, records, proposals is not None):
        missing = sum(record["text"] is None for record in records)
        result = {
            "count": len(records),
            "parsed": parsed_share(records),  # replaced by the share of the protocol if it has its own parser
            **find_protocol(name).score_records(records, proposals),
            "protocol": name,
            "missing": missing,
        }
        results[name] = result if items else without_items(result)
    return results


def check_scorable(
    records: Sequence[AnswerRecord], protocols: Sequence[str], proposals: Proposals | None = None
) -> None:
    """Raise ValueError if the annotations lack what a protocol compares answers with, such as words of references.

    Args:
        records: all records, which need no answers yet.
        protocols: names from `choose_protocols`.
        proposals: detected boxes, for protocols that need them.
    """
    for name in protocols:
        find_protocol(name).inputs(records, proposals)


def headline(results: Mapping[str, Mapping[str, Any]]) -> dict[str, MetricValue]:
    """The metrics that papers print (``Protocol.metrics``) in one flat dictionary.

    Returns:
        ``PROTOCOL METRIC`` -> fraction (CIDEr on its own scale), for example ``scanrefer/vgllm-direct acc@0.25``,
        ``scan2cap/vgllm CIDEr@0.5`` or ``detection/f1 F1@0.25``.
    """
    return {
        f"{name} {metric}": value
        for name, result in results.items()
        for metric, value in find_protocol(name).printed(result).items()
    }


def default_protocol(record: AnswerRecord) -> Protocol:
    """The protocol that is used for records like this one if none is named."""
    return find_protocol(choose_protocols((), [record])[0])


def read_boxes(file: Path | None) -> Proposals | None:
    """Detected boxes from a file of proposals; None if no file is given. Broken boxes are skipped and counted."""
    if file is None:
        return None
    proposals = read_proposals(file)
    broken = [message for messages in proposals.broken_boxes.values() for message in messages]
    broken += [message for text in proposals.broken.values() for message in text.splitlines()]
    if broken:
        logger.warning("%s", listed(f"{file}: {len(broken)} broken boxes are skipped", broken))
    return {scene: boxes.tolist() for scene, boxes in proposals.items()}


def without_items(result: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a result without scores and texts of single items."""
    kept = {key: value for key, value in result.items() if key not in PER_ITEM}
    if "at" in kept:
        kept["at"] = {k: {key: v for key, v in at.items() if key not in PER_ITEM} for k, at in kept["at"].items()}
    return kept


def check_records(records: Sequence[AnswerRecord]) -> None:
    """Raise ValueError if there are no records, records of several tasks, or two records of one sample."""
    check_keys("predictions", [record["id"] for record in records])
    task_of(records)


def task_of(records: Sequence[AnswerRecord]) -> str:
    """The task of the records. Raises ValueError if there are several."""
    tasks = sorted({str(record["task"]) for record in records})
    if len(tasks) != 1:
        raise ValueError(f"Records of several tasks ({', '.join(tasks)}) cannot be scored together.")
    return tasks[0]


def parsed_share(records: Sequence[AnswerRecord]) -> float:
    """Share of the records whose answer is not empty and can be parsed by ``Task.parse``.

    If the task is not registered (a plug-in may register a protocol only), all answers that are not empty count.
    """
    task = base.TASKS.get(task_of(records))
    parsed = 0
    for record in records:
        text = record["text"] or ""  # a missing prediction counts as an empty answer
        box_format: BoxFormat = "world" if record.get("form") == "world" else "camera"
        try:
            if task is not None:
                task.parse(text, len(record.get("cam_to_world") or ()), box_format)
        except AnswerError:
            continue
        parsed += bool(text.strip())
    return parsed / len(records)


def _form(records: Sequence[AnswerRecord]) -> str | None:
    """Coordinates of the boxes in the answers (field ``form``); None for tasks whose answers are not boxes.

    Raises:
        ValueError: the records have different coordinates.
    """
    # A data set has one answer format; records of several formats need different protocols.
    forms = {record.get("form") for record in records}
    if len(forms) > 1:
        raise ValueError(f"The answers mix {' and '.join(sorted(map(str, forms)))} coordinates; score them separately.")
    return forms.pop()
