"""ScanRefer's Acc@k for axis-aligned boxes in world coordinates, as two public evaluators compute it.

Acc@k is the share of descriptions whose predicted box has IoU >= k with the annotated one. A description without a
usable prediction counts as IoU 0. Accuracies are fractions in 0..1.

Answers in a frame's camera are scored here too: ``answer_world_box`` moves them to the world and encloses them in an
axis-aligned box. Protocols that compare them as oriented boxes are in ``scanrefer_vgllm.py``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from pydantic import model_validator

from w2r2_ds.boxes3d.aabb import aabb_iou
from w2r2_ds.data.sources.labels import MULTIPLE, OTHERS, UNIQUE, LabelMap, groups, nyu40_class, scannet_class
from w2r2_ds.data.sources.validation import Record as FrozenModel
from w2r2_ds.evaluation.protocols.records import (
    THRESHOLDS,
    AnswerRecord,
    Box6,
    Box9,
    Coordinates,
    Pose,
    Proposals,
    RecordFields,
    answer_world_box,
    enclosing_box,
)
from w2r2_ds.evaluation.protocols.registry import KeyPath, Protocol, ProtocolResult, register_protocol

GROUPS = (UNIQUE, MULTIPLE)
Box = Sequence[float]
"""``[cx, cy, cz, sx, sy, sz]`` in the axis-aligned world, metres."""


@dataclass(frozen=True)
class ScoredDescription:
    """One annotated description.

    Attributes:
        scene_id, object_id, object_name, ann_id: as in ScanRefer's file.
        box: box of its object.
        group, group_nyu40: unique or multiple by each class map, if the data set was prepared with them.
        scannet_class: class of the object, see ``scannet_class``.
        name: key in results; ``scene|object|ann`` if empty.
    """

    scene_id: str
    object_id: str
    object_name: str
    ann_id: str
    box: tuple[float, ...]
    group: str = ""
    group_nyu40: str = ""
    scannet_class: int = OTHERS
    name: str = ""

    @property
    def key(self) -> str:
        """The name, or ``scene|object|ann``."""
        return self.name or f"{self.scene_id}|{self.object_id}|{self.ann_id}"


def score_official(
    descriptions: Sequence[ScoredDescription],
    boxes: Mapping[str, Box | None],
    labels: LabelMap | None = None,
    split: Sequence[ScoredDescription] | None = None,
) -> ProtocolResult:
    """ScanRefer's own evaluator: axis-aligned IoU with + 1e-8, ScanNet-18 classes, classes in and not in "others".

    daveredrum/ScanRefer ``benchmark/eval.py``: ``evaluate``.

    Args:
        descriptions: all descriptions to score.
        boxes: by ``ScoredDescription.key``; None for an answer that could not be parsed.
        labels: raw category -> class (see ``LabelMap``); without it, the groups and classes of `descriptions` are used.
        split: all descriptions of the split, which decide what is unique; `descriptions` without it.

    Returns:
        ``protocol``; ``parsed`` (share with a box); ``scores`` and ``counts``: group (unique, multiple, overall) ->
        in_others, not_in_others, overall -> accuracies, or the number of descriptions; ``items``. As in the reference,
        an empty group has accuracy 0: check its count.

    Raises:
        ValueError: no descriptions, a description twice, or a box of an unknown description.
    """
    check_descriptions(descriptions, boxes)
    group_of = {(each.scene_id, each.object_id): each.group for each in descriptions}
    if labels is not None:
        group_of = groups(split or descriptions, labels, scannet_class)
    items = _box_items(descriptions, boxes, group_of)
    for item, each in zip(items.values(), descriptions, strict=True):
        item["class"] = each.scannet_class if labels is None else scannet_class(each.object_name, labels)
    scores = official_scores(list(items.values()))
    return {"protocol": "scanrefer_official", "parsed": _share_with_box(boxes, items), **scores, "items": items}


def official_scores(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """``scores`` and ``counts`` of `score_official` from rows with ``iou``, ``group`` and ``class``."""
    scores: dict[str, dict[str, Any]] = {}
    counts: dict[str, dict[str, int]] = {}
    for group in (*GROUPS, "overall"):
        rows = [item for item in items if group in ("overall", item["group"])]
        parts = {
            "not_in_others": [row for row in rows if row["class"] != OTHERS],
            "in_others": [row for row in rows if row["class"] == OTHERS],
            "overall": rows,
        }
        counts[group] = {name: len(part) for name, part in parts.items()}
        scores[group] = {
            name: accuracies(row["iou"] for row in part) if part else {f"acc@{k}": 0.0 for k in THRESHOLDS}
            for name, part in parts.items()
        }
    return {"scores": scores, "counts": counts}


def score_video3dllm(
    descriptions: Sequence[ScoredDescription],
    boxes: Mapping[str, Box | None],
    labels: LabelMap | None = None,
    split: Sequence[ScoredDescription] | None = None,
) -> ProtocolResult:
    """Video-3D-LLM's evaluator: axis-aligned IoU with + 1e-8, unique by NYU40 ids.

    LaVi-Lab/Video-3D-LLM ``llava/eval/eval_scanrefer.py``: ``main``.

    Args and errors: as `score_official`.

    Returns:
        ``protocol``; ``parsed``; ``all``, ``unique``, ``multiple``, each with ``count`` and accuracies (None in an
        empty group); ``items``.
    """
    check_descriptions(descriptions, boxes)
    group_of = {(each.scene_id, each.object_id): each.group_nyu40 for each in descriptions}
    if labels is not None:
        group_of = groups(split or descriptions, labels, nyu40_class)
    items = _box_items(descriptions, boxes, group_of)
    result: ProtocolResult = {"protocol": "video3dllm", "parsed": _share_with_box(boxes, items)}
    for name in ("all", *GROUPS):
        ious = [item["iou"] for item in items.values() if name in ("all", item["group"])]
        result[name] = {"count": len(ious), **accuracies(ious)}
    return {**result, "items": items}


def accuracies(ious: Iterable[float]) -> dict[str, float | None]:
    """``acc@k``: share of IoU >= k; None without values."""
    values = list(ious)
    return {f"acc@{k}": sum(iou >= k for iou in values) / len(values) if values else None for k in THRESHOLDS}


def accuracy_paths(*path: str) -> dict[str, KeyPath]:
    """``Protocol.metrics`` of a result that has the accuracies at a path."""
    return {f"acc@{k}": (*path, f"acc@{k}") for k in THRESHOLDS}


def check_descriptions(descriptions: Sequence[ScoredDescription], predictions: Mapping[str, Any]) -> None:
    """Raise ValueError without descriptions, for one that appears twice, and for a prediction of an unknown one."""
    if not descriptions:
        raise ValueError("There are no descriptions to score.")
    repeated = [key for key, number in Counter(each.key for each in descriptions).items() if number > 1]
    if repeated:
        raise ValueError(f"{len(repeated)} descriptions appear more than once, the first is {repeated[0]!r}.")
    unknown = sorted(predictions.keys() - {each.key for each in descriptions})
    if unknown:
        raise ValueError(f"{len(unknown)} predictions belong to no description, the first is {unknown[0]!r}.")


def _box_items(
    descriptions: Sequence[ScoredDescription], boxes: Mapping[str, Box | None], group_of: Mapping[tuple[str, str], str]
) -> dict[str, dict[str, Any]]:
    items = {}
    for each in descriptions:
        box = boxes.get(each.key)
        iou = 0.0 if box is None else aabb_iou(box, each.box)
        items[each.key] = {"iou": iou, "group": group_of[each.scene_id, each.object_id]}
    return items


def _share_with_box(boxes: Mapping[str, Box | None], items: Mapping[str, Any]) -> float:
    return sum(box is not None for box in boxes.values()) / len(items)


class GroundingTarget(FrozenModel):
    """Fields of a target that ScanRefer's protocols read."""

    box: Box9
    object_id: int | str
    object_name: str
    ann_id: str
    scannet_class: int
    group: Literal["unique", "multiple"]
    group_nyu40: Literal["unique", "multiple"]


class ScanReferRecord(RecordFields):
    """Fields of a record that ScanRefer's protocols read."""

    target: GroundingTarget
    form: Coordinates
    box: Box6 | None = None
    cam_to_world: list[Pose] | None = None

    @model_validator(mode="after")
    def _has_poses(self) -> ScanReferRecord:
        if self.form == "camera" and self.cam_to_world is None:
            raise ValueError("a record whose form is 'camera' needs the field 'cam_to_world'")
        return self


def description_of(record: AnswerRecord) -> ScoredDescription:
    """The description that a record answers."""
    target = record["target"]
    return ScoredDescription(
        scene_id=record["scene_id"],
        object_id=str(target["object_id"]),
        object_name=target["object_name"],
        ann_id=target["ann_id"],
        box=tuple(enclosing_box(target["box"])),
        group=target["group"],
        group_nyu40=target["group_nyu40"],
        scannet_class=target["scannet_class"],
        name=record["id"],
    )


def _world_inputs(records: Sequence[AnswerRecord], _: Proposals | None) -> tuple[Any, ...]:
    return [description_of(record) for record in records], {
        record["id"]: answer_world_box(record) for record in records
    }


_world_protocol = partial(Protocol, inputs=_world_inputs, record_model=ScanReferRecord, best_by="acc@0.25")

register_protocol(
    _world_protocol(
        "scanrefer/scanrefer_official",
        "World boxes, axis-aligned IoU with + 1e-8; unique and multiple by ScanNet-18 classes, others separately.",
        "daveredrum/ScanRefer benchmark/eval.py",
        score_official,
        accuracy_paths("scores", "overall", "overall"),
    )
)
register_protocol(
    _world_protocol(
        "scanrefer/video3dllm",
        "World boxes, axis-aligned IoU with + 1e-8; unique and multiple by NYU40 ids.",
        "LaVi-Lab/Video-3D-LLM llava/eval/eval_scanrefer.py",
        score_video3dllm,
        accuracy_paths("all"),
        default=True,
    )
)
