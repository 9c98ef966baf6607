"""Answer records as inputs of protocols: pydantic models of their fields, and the world box of a grounding answer.

All fields of a record are listed in ``evaluation/predictions/record.py``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import Len
from pydantic import FiniteFloat

from w2r2_ds.boxes3d.transforms import corners
from w2r2_ds.data.sources.validation import FrozenModel, Name
from w2r2_ds.data.tasks.parsing import AnswerError, WorldGrounding, parse_grounding, parse_world_box

AnswerRecord = Mapping[str, Any]
"""One generated answer and all data that its scoring needs, as JSON values."""
Proposals = Mapping[str, Sequence[Sequence[float]]]
"""Scene id -> detected boxes ``[cx, cy, cz, sx, sy, sz]`` in the axis-aligned world, metres."""
THRESHOLDS = (0.25, 0.5)
"""IoU thresholds k of Acc@k, m@k (m: a caption metric) and F1@k."""
IOU_DECIMALS = 9
"""Decimals to which exact IoU is rounded before ``>=``: a rounding error must not turn an exact 0.5 into a miss."""
Coordinates = Literal["camera", "world", "box"]
"""Field ``form`` of a record whose answer is a box; see ``record.py``."""

Box6 = Annotated[list[FiniteFloat], Len(6, 6)]
Box9 = Annotated[list[FiniteFloat], Len(9, 9)]
Pose = Annotated[list[Annotated[list[FiniteFloat], Len(4, 4)]], Len(4, 4)]


class RecordFields(FrozenModel):
    """Fields of every record; the subclass of a protocol adds those that the protocol reads.

    Validates the lines of a saved predictions file.
    """

    id: Name
    task: Name
    scene_id: Name
    text: str | None
    form: Coordinates | None = None
    annotated: bool = True


class ReferenceFields(FrozenModel):
    """One reference text, and its words as in the annotation file."""

    text: str
    words: list[str]


def answer_world_box(record: AnswerRecord) -> list[float] | None:
    """The answer's axis-aligned world box ``[6]`` (centre, size; metres); None if the answer cannot be parsed.

    A box in a frame's camera is moved to the world with the frame's pose and enclosed by the smallest axis-aligned box.
    If its exact angles make it axis-aligned in the world, the enclosing box is the box itself; angles rounded to two
    decimals enlarge it slightly.

    Args:
        record: a record with ``form``.
    """
    if record["form"] == "box":
        return list(record["box"]) if record.get("box") is not None else None
    text, poses = record["text"] or "", np.array(record.get("cam_to_world") or ())
    try:
        is_world = record["form"] == "world"
        answer = WorldGrounding(parse_world_box(text)) if is_world else parse_grounding(text, len(poses))
    except AnswerError:
        return None
    # Generated numbers may be so large that the product overflows; such a box counts as no box (checked below).
    with np.errstate(over="ignore", invalid="ignore"):
        enclosing = enclosing_box(answer.world_box(poses).tolist())
    return enclosing if np.isfinite(enclosing).all() and min(enclosing[3:]) > 0 else None


def enclosing_box(box: Sequence[float]) -> list[float]:
    """The smallest axis-aligned box ``[6]`` (centre, size) around a box of six or nine numbers."""
    nine = np.array(nine_numbers(box))
    if not nine[6:].any():  # already axis-aligned: returned without the rounding of corner arithmetic
        return list(map(float, nine[:6]))
    points = corners(nine)  # [8, 3]
    low, high = points.min(axis=0), points.max(axis=0)
    return [*map(float, (low + high) / 2), *map(float, high - low)]


def nine_numbers(box: Sequence[float]) -> list[float]:
    """A box in the format of ``boxes3d/transforms.py``: centre, size, ZXY angles; six numbers get angles of 0.

    Raises:
        ValueError: neither six nor nine numbers.
    """
    if len(box) not in (6, 9):
        raise ValueError(f"A box must have six numbers (centre, size) or nine (and angles), not {len(box)}.")
    return [*map(float, box), 0.0, 0.0, 0.0][:9]


def check_keys(what: str, annotated: Sequence[str], predicted: Iterable[str] = ()) -> None:
    """Check the keys of annotations and predictions.

    Args:
        what: plural noun for the annotations, for messages.
        annotated: keys of the annotations.
        predicted: keys of the predictions; some may be missing.

    Raises:
        ValueError: there are no annotations, a key is annotated twice, or a prediction has a key without annotation.
    """
    if not annotated:
        raise ValueError(f"There are no {what} to score.")
    repeated = [key for key, number in Counter(annotated).items() if number > 1]
    raise_with_first(repeated, f"{what} appear more than once")
    raise_with_first(sorted(set(predicted) - set(annotated)), f"predictions belong to none of the {what}")


def raise_with_first(keys: Sequence[str], problem: str, advice: str = "") -> None:
    """Raise ValueError with the number of keys and the first of them, unless there are none.

    Args:
        keys: keys that have the problem.
        problem: the problem, after the number of keys in the message.
        advice: end of the message.
    """
    if keys:
        raise ValueError(f"{len(keys)} {problem}, the first is {keys[0]!r}{advice}.")
