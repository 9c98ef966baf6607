"""Scores of records (``record.py``) by any protocol of ``protocol.py``: no model, no images, no annotation files."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from w2r2_ds.boxes3d.transforms import camera_to_world, corners
from w2r2_ds.data.sources.proposals import read_proposals
from w2r2_ds.data.tasks.parsing import AnswerError, parse_grounding, parse_world_box
from w2r2_ds.evaluation.protocols import scanrefer
from w2r2_ds.evaluation.protocols.detection import Scene
from w2r2_ds.evaluation.protocols.refinement import nine_numbers
from w2r2_ds.evaluation.protocols.registry import PROTOCOLS, Protocol, find_protocol
from w2r2_ds.evaluation.protocols.scan2cap import Caption, DescribedObject
from w2r2_ds.evaluation.protocols.scanrefer import ScoredDescription

Record = Mapping[str, Any]
Proposals = Mapping[str, Sequence[Sequence[float]]]
"""Scene -> detected world boxes ``[cx, cy, cz, sx, sy, sz]``, metres."""

DEFAULT = {
    "scanrefer": "scanrefer/vgllm-direct",
    "scan2cap": "scan2cap/vgllm",
    "scanqa": "scanqa/video3dllm",
    "detection": "detection/f1",
}
WORLD_DEFAULT = "scanrefer/video3dllm"
"""Of ScanRefer's answers in world coordinates."""

REFINED = "scanrefer/vgllm_refined"
CAMERA_ONLY = ("scanrefer/vgllm-direct", "scanrefer/vgllm", "scanrefer/vgllm_ZXY", REFINED)
WORDS_ONLY = ("scan2cap/scan2cap_original", "scan2cap/scan2cap_benchmark")
PER_ITEM = ("items", "candidates", "references", "mask", "items_before_mask")

_WORD = re.compile(r"\w+?(?=n't\b)|n't\b|'\w+|\w+|[^\w\s]")


def choose_protocols(names: Sequence[str], records: Sequence[Record], proposals: bool = False) -> list[str]:
    """Full names of the protocols that were asked for.

    Args:
        names: ``task/protocol``, or the second part alone; ``all`` for every protocol that applies to these records;
            nothing for the task's default.
        records: of one task, not none.
        proposals: whether detected boxes are there, so that ``all`` includes refinement by them.

    Raises:
        ValueError: an unknown name, one of another task, or one that these answers cannot be scored by.
    """
    task, forms = _one(records, "task"), {record.get("form") for record in records}
    if len(forms) > 1:
        raise ValueError(f"The answers mix {' and '.join(sorted(map(str, forms)))} coordinates; score each data set.")
    if task not in DEFAULT:
        raise ValueError(f"Task {task!r} has no scores; it is one of {', '.join(DEFAULT)}.")
    in_camera = forms == {"camera"} or task != "scanrefer"
    if not names:
        return [DEFAULT[task] if in_camera else WORLD_DEFAULT]
    if REFINED.removeprefix("scanrefer/") in {name.removeprefix("scanrefer/") for name in names} and not proposals:
        raise ValueError(f"Protocol {REFINED} needs detected boxes; name their file with --proposals.")
    if "all" in names:
        possible = [name for name, each in PROTOCOLS.items() if each.task == task]
        possible = [name for name in possible if (in_camera or name not in CAMERA_ONLY)]
        return [name for name in possible if name != REFINED or proposals]
    chosen = [find_protocol(name if "/" in name else f"{task}/{name}") for name in names]
    for each in chosen:
        if each.task != task:
            raise ValueError(f"Protocol {each.name} scores {each.task}, but these are answers of {task}.")
        if each.name in CAMERA_ONLY and not in_camera:
            raise ValueError(
                f"Protocol {each.name} reads boxes in a frame's camera, but these answers are boxes in the world; "
                f"use {WORLD_DEFAULT} or scanrefer/scanrefer_official."
            )
    return list(dict.fromkeys(each.name for each in chosen))


def score_records(
    records: Sequence[Record], protocols: Sequence[str] = (), proposals: Proposals | None = None, items: bool = False
) -> dict[str, dict[str, Any]]:
    """Scores of records of one task, by protocol.

    Args:
        records: all that count, each once; a missing prediction is a failure (``text`` is None).
        protocols: see ``choose_protocols``.
        proposals: detected boxes, for ``scanrefer/vgllm_refined``.
        items: keep what each protocol says about every item.

    Returns:
        full name -> what the protocol's function returns, with ``protocol`` the full name, and ``count``, ``parsed``
        (share of answers that could be read; of captions and short answers, that are not empty) and ``missing`` added.
        What could not be computed is None, and ``not_computed`` says why.

    Raises:
        ValueError: no records, one twice, of several tasks, or a protocol that does not apply to them.
    """
    check_records(records)
    results = {}
    for name in choose_protocols(protocols, records, proposals is not None):
        protocol = find_protocol(name)
        result = _SCORERS[protocol.task](protocol, records, proposals)
        missing = sum(record["text"] is None for record in records)
        known = {"count": len(records), "parsed": _parsed(records), "missing": missing}
        result = {**known, **result, "protocol": name, "missing": missing}
        if "parsed" in result and not isinstance(result["parsed"], float):
            result["parsed"] /= len(records)  # score_vgllm counts
        results[name] = result if items else without_items(result)
    return results


def headline(results: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
    """The numbers that papers print, flat: ``protocol`` + `` `` + metric -> fraction (CIDEr on its own scale).

    For example ``scanrefer/vgllm-direct acc@0.25``, ``scan2cap/vgllm CIDEr@0.5``, ``scanqa/video3dllm EM``,
    ``detection/f1 F1@0.25``.
    """
    found: dict[str, float | None] = {}
    for name, result in results.items():
        if "at" in result:
            for k, at in result["at"].items():
                values = at.get("corpus", at)
                found |= {f"{name} {metric}@{k}": v for metric, v in values.items() if metric in _PRINTED}
        elif "corpus" in result:
            found |= {f"{name} {metric}": value for metric, value in result["corpus"].items() if metric in _PRINTED}
        else:
            scores = result.get("overall") or result.get("all")
            if "scores" in result:
                scores = result["scores"]["overall"]["overall"]
            scores = result if scores is None else scores
            found |= {f"{name} acc@{k}": scores[f"acc@{k}"] for k in scanrefer.THRESHOLDS}
    return found


_PRINTED = ("CIDEr", "BLEU-4", "METEOR", "ROUGE-L", "EM", "EM-refined", "F1")


def read_boxes(file: Path | None) -> Proposals | None:
    """Detected boxes from a file of proposals; None without one."""
    if file is None:
        return None
    return {scene: boxes.tolist() for scene, boxes in read_proposals(file).items()}


def without_items(result: Mapping[str, Any]) -> dict[str, Any]:
    """The same scores without the per-item values."""
    kept = {key: value for key, value in result.items() if key not in PER_ITEM}
    if "at" in kept:
        kept["at"] = {k: {key: v for key, v in at.items() if key not in PER_ITEM} for k, at in kept["at"].items()}
    return kept


def check_records(records: Sequence[Record]) -> None:
    """Refuse what would mislead: nothing, several tasks, or an answer that counts twice."""
    if not records:
        raise ValueError("There are no predictions to score.")
    _one(records, "task")
    twice = [name for name, number in Counter(record["id"] for record in records).items() if number > 1]
    if twice:
        raise ValueError(f"{len(twice)} samples have more than one prediction, the first is {twice[0]!r}.")


def world_box(record: Record) -> list[float] | None:
    """The answer's axis-aligned world box ``[6]`` (centre, size; metres); None where it cannot be read.

    An answer in a frame's camera is moved to the world and enclosed by the smallest axis-aligned box: a camera looks at
    a room askew, so the nine numbers give an oriented box in the world, which grows by that. An answer whose angles are
    right grows by their rounding only.
    """
    if record["form"] == "box":
        return list(record["box"]) if record.get("box") is not None else None
    text = record["text"] or ""
    try:
        if record["form"] == "world":
            return list(map(float, parse_world_box(text)))
        answer = parse_grounding(text, len(record["cam_to_world"]))
    except AnswerError:
        return None
    with np.errstate(over="ignore", invalid="ignore"):  # numbers as large as the world's
        box = camera_to_world(answer.box, np.array(record["cam_to_world"][answer.frame]))
        found = enclosing(box.tolist())
    return found if np.isfinite(found).all() and min(found[3:]) > 0 else None


def enclosing(box: Sequence[float]) -> list[float]:
    """The axis-aligned box ``[6]`` (centre, size) around a box of six or nine numbers."""
    nine = np.array(nine_numbers(box))
    if not nine[6:].any():  # as it is: no rounding
        return list(map(float, nine[:6]))
    points = corners(nine)
    low, high = points.min(axis=0), points.max(axis=0)
    return [*map(float, (low + high) / 2), *map(float, high - low)]


def split_words(text: str) -> list[str]:
    """Words of a caption as near to ScanRefer's ``token`` as a rule comes: lower case, marks and 's, n't apart."""
    return _WORD.findall(text.lower())


def _scanrefer(protocol: Protocol, records: Sequence[Record], proposals: Proposals | None) -> dict[str, Any]:
    if protocol.name == DEFAULT["scanrefer"]:
        return protocol.score([_direct(record) for record in records])
    described = [_description(record) for record in records]
    if protocol.name in CAMERA_ONLY:
        texts = {record["id"]: record["text"] or "" for record in records}
        poses = {record["id"]: np.array(record["cam_to_world"]).reshape(-1, 4, 4) for record in records}
        if protocol.name != REFINED:
            return protocol.score(described, texts, poses)
        assert proposals is not None, "choose_protocols asks for them"
        return protocol.score(described, texts, poses, proposals)
    boxes = {record["id"]: world_box(record) for record in records}
    read = sum(box is not None for box in boxes.values()) / len(boxes)
    return {**protocol.score(described, boxes), "parsed": read}


def _direct(record: Record) -> Mapping[str, Any]:
    target = record["target"]
    if record["text"] is None:
        return {"id": record["id"], "group": target["group"], "iou": 0.0, "parsed": False, "reason": "no prediction"}
    poses = np.array(record["cam_to_world"]).reshape(-1, 4, 4)
    box = np.array(nine_numbers(target["box"]))
    return scanrefer.score_answer(record["id"], record["text"], poses, box, target["group"])


def _description(record: Record) -> ScoredDescription:
    target = record["target"]
    return ScoredDescription(
        scene_id=record["scene_id"],
        object_id=str(target["object_id"]),
        object_name=target["object_name"],
        ann_id=target["ann_id"],
        box=tuple(enclosing(target["box"])),
        group=target["group"],
        group_nyu40=target["group_nyu40"],
        scannet_class=target["scannet_class"],
        name=record["id"],
    )


def _scan2cap(protocol: Protocol, records: Sequence[Record], _: Proposals | None) -> dict[str, Any]:
    objects, captions = [], {}
    for record in records:
        target = record["target"]
        each = DescribedObject(
            scene_id=record["scene_id"],
            object_id=str(target["object_id"]),
            object_name=target["object_name"],
            descriptions=tuple(reference["text"] for reference in record["references"]),
            tokens=tuple(tuple(reference["words"]) for reference in record["references"]),
            box=tuple(enclosing(target["box"])),
        )
        if (protocol.name in WORDS_ONLY or protocol.name == "scan2cap/leo") and not all(each.tokens):
            raise ValueError(
                f"Protocol {protocol.name} compares with the words of ScanRefer's file, but the references of "
                f"{record['id']} have none; prepare the data set from a file with the field 'token'."
            )
        objects.append(each)
        if record["text"] is not None:
            words = tuple(split_words(record["text"])) if protocol.name in WORDS_ONLY else None
            box = target["described"]
            captions[each.key] = Caption(record["text"], None if box is None else tuple(box), words, record.get("iou"))
    return protocol.score(objects, captions)


def _scanqa(protocol: Protocol, records: Sequence[Record], _: Proposals | None) -> dict[str, Any]:
    questions = {record["id"]: [reference["text"] for reference in record["references"]] for record in records}
    answers = {record["id"]: [record["text"]] for record in records if record["text"] is not None}
    return protocol.score(questions, answers)


def _detection(protocol: Protocol, records: Sequence[Record], _: Proposals | None) -> dict[str, Any]:
    scenes = []
    for record in records:
        objects = [(each["label"], np.array(each["box"])) for each in record["objects"]]
        scenes.append(Scene(record["id"], objects, record["text"]))
    return protocol.score(scenes)


_SCORERS: Mapping[str, Callable[[Protocol, Sequence[Record], Proposals | None], dict[str, Any]]] = {
    "scanrefer": _scanrefer,
    "scan2cap": _scan2cap,
    "scanqa": _scanqa,
    "detection": _detection,
}


def _parsed(records: Sequence[Record]) -> float:
    """Share of answers that hold anything; protocols that read numbers put their own share in its place."""
    return sum(bool((record["text"] or "").strip()) for record in records) / len(records)


def _one(records: Iterable[Record], field: str) -> str:
    values = sorted({str(record[field]) for record in records})
    if len(values) != 1:
        raise ValueError(f"Records of several tasks ({', '.join(values)}) cannot be scored together.")
    return values[0]
