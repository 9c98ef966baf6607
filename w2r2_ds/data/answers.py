"""Strict reading of generated answers.

A grounding answer is one JSON object, with or without a ```json fence around it, on one line or several:

    {"frame": 12, "bbox_3d": [-0.63, -0.83, 2.43, 3.0, 0.59, 2.35, -2.32, 1.18, 3.05]}

Nothing is guessed and nothing is evaluated: whatever is not exactly this is a failure with a reason. VG-LLM's evaluator
reads the first line that holds "bbox_3d" as a Python literal instead; on the answers that models are trained to give
(one line) both read the same.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

_FENCE = re.compile(r"```(?:json)?[ \t]*\n?(.*?)\s*```", re.DOTALL)
_KEYS = {"frame", "bbox_3d"}


class AnswerError(ValueError):
    """An answer that cannot be read.

    Attributes:
        reason: why, in words that do not depend on the answer, so that reasons can be counted.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(f"The answer cannot be read: {reason}.")
        self.reason = reason


@dataclass(frozen=True)
class Grounding:
    """A grounding answer.

    Attributes:
        frame: index into the sample's frames.
        box: ``[9]`` float64 in that frame's camera (metres, radians; see ``data/boxes.py``).
    """

    frame: int
    box: np.ndarray


def parse_grounding(text: str, frame_count: int) -> Grounding:
    """Read a grounding answer, or raise ``AnswerError``.

    Args:
        text: the generated text, without special tokens.
        frame_count: number of frames that the model saw.
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


def _json_object(text: str) -> dict[str, Any]:
    """The one JSON object that the text consists of."""
    body = text.strip()
    fenced = _FENCE.fullmatch(body)
    try:
        value = json.loads(
            fenced.group(1) if fenced else body, parse_constant=_no_constant, object_pairs_hook=_no_duplicates
        )
    except AnswerError:
        raise
    except (ValueError, RecursionError) as error:
        raise AnswerError("it is not exactly one JSON object") from error
    if not isinstance(value, dict):
        raise AnswerError("it is not exactly one JSON object")
    return value


def _box(values: object) -> np.ndarray:
    """``[9]`` float64 from a list of nine finite numbers, the sizes positive."""
    if not isinstance(values, list) or len(values) != 9:
        raise AnswerError("bbox_3d is not a list of 9 numbers")
    if any(isinstance(value, bool) or not isinstance(value, int | float) for value in values):
        raise AnswerError("bbox_3d is not a list of 9 numbers")
    try:
        numbers = [float(value) for value in values]
    except OverflowError as error:
        raise AnswerError("bbox_3d holds a number that is not finite") from error
    if not all(math.isfinite(number) for number in numbers):
        raise AnswerError("bbox_3d holds a number that is not finite")
    if min(numbers[3:6]) <= 0:
        raise AnswerError("bbox_3d has a size that is not positive")
    return np.array(numbers)


def _no_constant(_: str) -> NoReturn:
    """JSON has no NaN or Infinity, though Python's reader takes them."""
    raise AnswerError("bbox_3d holds a number that is not finite")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A dict from the pairs of a JSON object, none of them twice."""
    if len({key for key, _ in pairs}) != len(pairs):
        raise AnswerError("a key is there twice")
    return dict(pairs)
