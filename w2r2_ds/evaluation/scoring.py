"""Scores of answer records by the protocols of the registry: no model, no images, no annotation files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from w2r2_ds.data.sources.proposals import read_proposals
from w2r2_ds.data.tasks import base
from w2r2_ds.data.tasks.parsing import AnswerError
from w2r2_ds.evaluation.metrics.captions import MetricValue
from w2r2_ds.evaluation.protocols.records import AnswerRecord, Proposals, check_keys
from w2r2_ds.evaluation.protocols.registry import Protocol, find_protocol, protocols_of

PER_ITEM = ("items", "candidates", "references", "mask", "items_before_mask")


def choose_protocols(names: Sequence[str], records: Sequence[AnswerRecord], proposals: bool = False) -> list[str]:
    """Full names of the requested protocols.

    Args:
        names: ``task/protocol``, or only the second part; ``all`` for every protocol that can score these records;
            empty for the task's default.
        records: at least one, all of one task.
        proposals: whether detected boxes are given; ``all`` then includes the protocols that need them.

    Raises:
        ValueError: an unknown protocol, one of another task, or one that cannot score these records.
    """
    task, form = task_of(records), _form(records)
    protocols = protocols_of(task)
    possible = [each for each in protocols if form is None or form in each.coordinates]
    if not possible:
        known = ", ".join(f"{each.name} ({' or '.join(each.coordinates)})" for each in protocols)
        raise ValueError(f"No protocol of {task} scores boxes in {form} coordinates; its protocols score {known}.")
    usable = [each for each in possible if proposals or not each.needs_proposals]
    if not usable and (not names or "all" in names):
        raise ValueError(
            f"The protocols of {task} for these answers ({', '.join(each.name for each in possible)}) need detected "
            "boxes; give their file with --proposals."
        )
    if not names:
        defaults = [each for each in usable if each.default] or usable
        return [min(defaults, key=lambda each: len(each.coordinates)).name]
    if "all" in names:
        return [each.name for each in usable]
    chosen = [find_protocol(name if "/" in name else f"{task}/{name}") for name in names]
    for each in chosen:
        if each.task != task:
            raise ValueError(f"Protocol {each.name} scores {each.task}, but these are answers of {task}.")
        if each.needs_proposals and not proposals:
            raise ValueError(f"Protocol {each.name} needs detected boxes; give their file with --proposals.")
        if each not in possible:
            raise ValueError(
                f"Protocol {each.name} scores boxes in {' or '.join(each.coordinates)} coordinates, but these answers "
                f"are in {form} coordinates; use {' or '.join(other.name for other in possible)}."
            )
    return list(dict.fromkeys(each.name for each in chosen))


def score_records(
    records: Sequence[AnswerRecord],
    protocols: Sequence[str] = (),
    proposals: Proposals | None = None,
    items: bool = False,
) -> dict[str, dict[str, Any]]:
    """Scores of records of one task, by protocol.

    Args:
        records: all samples that count, each once; ``text`` is None for a missing prediction, which is a failure.
        protocols: see `choose_protocols`.
        proposals: detected boxes, for protocols that need them.
        items: keep the scores of every item.

    Returns:
        Full name -> result of the protocol's score function, with ``protocol`` replaced by the full name and ``count``,
        ``parsed`` (share of answers that could be parsed) and ``missing`` (records without a prediction) added. A score
        that could not be computed is None; ``not_computed`` has the reason.

    Raises:
        ValueError: no records, two of one sample, of several tasks, or a protocol that cannot score them.
    """
    check_records(records)
    results = {}
    for name in choose_protocols(protocols, records, proposals is not None):
        missing = sum(record["text"] is None for record in records)
        result = {
            "count": len(records),
            "parsed": parsed_share(records),  # replaced if the protocol parses the answers itself
            **find_protocol(name).score_records(records, proposals),
            "protocol": name,
            "missing": missing,
        }
        results[name] = result if items else without_items(result)
    return results


def headline(results: Mapping[str, Mapping[str, Any]]) -> dict[str, MetricValue]:
    """The numbers that papers print, flat: ``protocol`` + blank + metric -> fraction (CIDEr on its own scale).

    For example ``scanrefer/vgllm-direct acc@0.25``, ``scan2cap/vgllm CIDEr@0.5`` or ``detection/f1 F1@0.25``; each
    protocol lists its metrics (``Protocol.metrics``).
    """
    return {
        f"{name} {metric}": value
        for name, result in results.items()
        for metric, value in find_protocol(name).printed(result).items()
    }


def default_protocol(record: AnswerRecord) -> Protocol:
    """The protocol that scores records like this one if none is named."""
    return find_protocol(choose_protocols((), [record])[0])


def read_boxes(file: Path | None) -> Proposals | None:
    """Detected boxes from a file of proposals; None without one."""
    if file is None:
        return None
    return {scene: boxes.tolist() for scene, boxes in read_proposals(file).items()}


def without_items(result: Mapping[str, Any]) -> dict[str, Any]:
    """The same result without scores and texts per item."""
    kept = {key: value for key, value in result.items() if key not in PER_ITEM}
    if "at" in kept:
        kept["at"] = {k: {key: v for key, v in at.items() if key not in PER_ITEM} for k, at in kept["at"].items()}
    return kept


def check_records(records: Sequence[AnswerRecord]) -> None:
    """Raise ValueError for an empty list, records of several tasks, or two records of one sample."""
    check_keys("predictions", [record["id"] for record in records])
    task_of(records)


def task_of(records: Sequence[AnswerRecord]) -> str:
    """The task of all records. Raises ValueError if there are several."""
    tasks = sorted({str(record["task"]) for record in records})
    if len(tasks) != 1:
        raise ValueError(f"Records of several tasks ({', '.join(tasks)}) cannot be scored together.")
    return tasks[0]


def parsed_share(records: Sequence[AnswerRecord]) -> float:
    """Share of answers that are not empty and that ``Task.parse`` can parse.

    A plug-in may register a protocol without its task; then all texts that are not empty count.
    """
    task = base.TASKS.get(task_of(records))
    parsed = 0
    for record in records:
        text = record["text"] or ""
        try:
            if task is not None:
                task.parse(text, len(record.get("cam_to_world") or ()))
        except AnswerError:
            continue
        parsed += bool(text.strip())
    return parsed / len(records)


def _form(records: Sequence[AnswerRecord]) -> str | None:
    """Coordinates of the answers; None for tasks that do not answer with a box."""
    forms = {record.get("form") for record in records}
    if len(forms) > 1:
        raise ValueError(f"The answers mix {' and '.join(sorted(map(str, forms)))} coordinates; score each data set.")
    return forms.pop()
