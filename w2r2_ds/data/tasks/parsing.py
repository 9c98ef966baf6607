"""Strict parsers of generated answers.

A grounding answer is one JSON object on one or several lines, with or without a ```json code block:

    {"frame": 12, "bbox_3d": [-0.63, -0.83, 2.43, 3.0, 0.59, 2.35, -2.32, 1.18, 3.05]}

A detection is a JSON list of labels and boxes. A grounding in world coordinates is six numbers,
``x_min,y_min,z_min,x_max,y_max,z_max`` (Video-3D-LLM's "gen" template).

Any other text raises `AnswerError` with a reason: answers are not repaired, and never passed to ``eval``. VG-LLM's
evaluator parses the first line with "bbox_3d" as a Python literal instead; answers in the trained format (one line)
give the same result.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from w2r2_ds.boxes3d.transforms import camera_to_world

_CODE_BLOCK = re.compile(r"```(?:json)?[ \t]*\n?(.*?)\s*```", re.DOTALL)
_KEYS = {"frame", "bbox_3d"}
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", re.ASCII)


class AnswerError(ValueError):
    """A generated answer that cannot be parsed.

    Attributes:
        reason: independent of the answer's content, so that reasons can be counted.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(f"The answer cannot be parsed: {reason}.")
        self.reason = reason


@dataclass(frozen=True)
class Grounding:
    """A grounding answer in a frame's camera (box format ``camera``).

    Attributes:
        frame: index into the sample's frames.
        box: ``[9]`` float64 in that frame's camera (metres, radians; see ``boxes3d/transforms.py``).
    """

    frame: int
    box: np.ndarray

    def world_box(self, cam_to_world: np.ndarray) -> np.ndarray:
        """The box in the world, ``[9]`` float64; `cam_to_world` has the poses of the frames, ``[frames, 4, 4]``.

        Numbers of a generated box may be so large that the result is not finite.
        """
        with np.errstate(over="ignore", invalid="ignore"):
            return camera_to_world(self.box, cam_to_world[self.frame])


@dataclass(frozen=True)
class WorldGrounding:
    """A grounding answer in the axis-aligned world (box format ``world``).

    Attributes:
        box: ``[6]`` float64 centre and size, metres.
    """

    box: np.ndarray

    def world_box(self, cam_to_world: np.ndarray) -> np.ndarray:
        """The box as ``[9]`` float64, with angles of 0; the poses are not used."""
        return np.concatenate([self.box, np.zeros(3)])


def parse_grounding(text: str, frame_count: int) -> Grounding:
    """Parse a grounding answer.

    Args:
        text: generated text, without special tokens.
        frame_count: number of frames of the sample.

    Raises:
        AnswerError: the text is not exactly one grounding, or the frame is out of range.
    """
    answer = _json_object(text)
    if set(answer) != _KEYS:
        raise AnswerError("the keys are not exactly frame and bbox_3d")
    frame = answer["frame"]
    if not isinstance(frame, int) or isinstance(frame, bool):
        raise AnswerError("frame is not an integer")
    if not 0 <= frame < frame_count:
        raise AnswerError("frame is out of range")
    return Grounding(frame=frame, box=_box(answer["bbox_3d"]))


def parse_objects(text: str) -> list[tuple[str, np.ndarray]]:
    """Parse a detection answer: labels and ``[9]`` float64 boxes in its order, or raise ``AnswerError``.

    Every entry has exactly a label and a box. The key of the box is box_3d or bbox_3d, since VG-LLM's prompt and
    evaluator differ. The empty list is valid.
    """
    entries = _json(text, "it is not exactly one JSON list")
    if not isinstance(entries, list):
        raise AnswerError("it is not exactly one JSON list")
    return [_object(entry) for entry in entries]


def _object(entry: object) -> tuple[str, np.ndarray]:
    """Label and ``[9]`` box of one entry of a detection."""
    if not isinstance(entry, dict) or set(entry) not in ({"label", "box_3d"}, {"label", "bbox_3d"}):
        raise AnswerError("the keys of an entry are not exactly label and box_3d")
    label = entry["label"]
    if not isinstance(label, str) or not label.strip():
        raise AnswerError("a label is not a text")
    return label, _box(entry["box_3d"] if "box_3d" in entry else entry["bbox_3d"])


def parse_world_box(text: str) -> np.ndarray:
    """Parse two corners as a ``[6]`` float64 world box (centre, size; metres), or raise ``AnswerError``."""
    parts = text.strip().split(",")
    if len(parts) != 6 or not all(_NUMBER.fullmatch(part.strip()) for part in parts):
        raise AnswerError("it is not exactly six numbers with commas between them")
    corners = np.array([float(part) for part in parts])
    if not np.isfinite(corners).all():
        raise AnswerError("it holds a number that is not finite")
    low, high = corners[:3], corners[3:]
    if not (high > low).all():
        raise AnswerError("a highest coordinate is not above the lowest")
    half = high / 2 - low / 2  # halves first: sums and differences of large numbers may overflow
    if not (half < np.finfo(np.float64).max / 2).all():
        raise AnswerError("a side is not finite")
    return np.concatenate([low / 2 + high / 2, high - low])


def _json_object(text: str) -> dict[str, Any]:
    """The text as exactly one JSON object."""
    value = _json(text, "it is not exactly one JSON object")
    if not isinstance(value, dict):
        raise AnswerError("it is not exactly one JSON object")
    return value


def _json(text: str, reason: str) -> Any:
    """The text as exactly one JSON value, with or without a code block; `reason` is that of the error otherwise."""
    body = text.strip()
    block = _CODE_BLOCK.fullmatch(body)
    try:
        return json.loads(
            block.group(1) if block else body, parse_constant=_no_constant, object_pairs_hook=_no_duplicates
        )
    except AnswerError:
        raise
    except (ValueError, RecursionError) as error:
        raise AnswerError(reason) from error


def _box(values: object) -> np.ndarray:
    """``[9]`` float64 from a list of nine finite numbers with positive sizes."""
    if not isinstance(values, list) or len(values) != 9:
        raise AnswerError("bbox_3d is not a list of 9 numbers")
    if any(isinstance(value, bool) or not isinstance(value, int | float) for value in values):
        raise AnswerError("bbox_3d is not a list of 9 numbers")
    try:
        numbers = [float(value) for value in values]
    except OverflowError as error:  # an integer of more than 308 digits
        raise AnswerError("bbox_3d holds a number that is not finite") from error
    if not all(math.isfinite(number) for number in numbers):
        raise AnswerError("bbox_3d holds a number that is not finite")
    if min(numbers[3:6]) <= 0:
        raise AnswerError("bbox_3d has a size that is not positive")
    return np.array(numbers)


def _no_constant(_: str) -> NoReturn:
    """JSON has no NaN or Infinity, but Python's parser accepts them."""
    raise AnswerError("bbox_3d holds a number that is not finite")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A dict from the pairs of a JSON object; a repeated key is an error."""
    if len({key for key, _ in pairs}) != len(pairs):
        raise AnswerError("a key is there twice")
    return dict(pairs)
