"""Parsers of grounding answers as in VG-LLM's evaluator, and the two interpretations of their angles.

Source: LaVi-Lab/VG-LLM ``src/lmms_eval/tasks/scanrefer/utils.py`` (``scanrefer_process_results``,
``transform_scanrefer_bbox``). That evaluator runs ``eval`` on the generated text; here only literals are parsed.
This project's own strict parser is in ``data/tasks/parsing.py``.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError
from scipy.spatial.transform import Rotation

from w2r2_ds.boxes3d.transforms import camera_to_world
from w2r2_ds.data.tasks.parsing import AnswerError, Grounding
from w2r2_ds.evaluation.protocols.records import Box9

AnswerParser = Callable[[str, int], Grounding]
"""(generated text, number of frames) -> answer; raises `AnswerError`."""
BoxTransform = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(box ``[9]`` in a camera, ``cam_to_world`` ``[4, 4]``) -> box ``[9]`` in the world."""
_BOX = TypeAdapter(Box9)


def parse_line(text: str, frame_count: int) -> Grounding:
    """Parse the first line with "bbox_3d" as a Python literal: an integer frame in range and a list of nine numbers.

    Single quotes are accepted; a dictionary over several lines or after text is not. Unlike VG-LLM's evaluator, this
    parser also accepts a comma after the dictionary, and does not accept a bool as the frame.

    Raises:
        AnswerError: there is no such line, or it is not such a literal.
    """
    # Unwraps a Markdown code block, which the evaluator does by stripping characters at the ends of the text.
    lines = text.replace("`", "").replace("json", "").split("\n")
    line = next((line.strip() for line in lines if "bbox_3d" in line), None)
    if line is None:
        raise AnswerError("no line holds bbox_3d")
    try:
        value = ast.literal_eval(line)
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise AnswerError("the line with bbox_3d is not a literal") from error
    if isinstance(value, tuple) and len(value) == 1:  # a comma after the dictionary
        value = value[0]
    return _in_range(_grounding(value), frame_count)


def parse_anywhere(text: str, frame_count: int) -> Grounding:
    """Parse the first JSON object anywhere in the text that has an integer frame and nine numbers.

    Raises:
        AnswerError: there is no such object, or its frame is out of range.
    """
    for value in _json_objects(text):
        try:
            answer = _grounding(value)
        except AnswerError:
            continue  # an object of another form; a later one may be the answer
        return _in_range(answer, frame_count)
    raise AnswerError("it holds no JSON object with frame and bbox_3d")


def extrinsic_to_world(box: np.ndarray, cam_to_world: np.ndarray) -> np.ndarray:
    """Transform a box ``[9]`` to the world as VG-LLM's evaluator does: SciPy's ``zxy``, R = Ry(a2) Rx(a1) Rz(a0).

    The resulting angles are extrinsic too, but that evaluator computes IoU as if they were intrinsic ZXY. The protocol
    reproduces this error: callers use the result as a box of ``boxes3d/transforms.py``.
    """
    rotation = cam_to_world[:3, :3] @ Rotation.from_euler("zxy", box[6:]).as_matrix()
    with warnings.catch_warnings():
        # SciPy warns of gimbal lock and sets one angle to 0, in VG-LLM's evaluator too.
        warnings.simplefilter("ignore", UserWarning)
        angles = Rotation.from_matrix(rotation).as_euler("zxy")
    return np.concatenate([cam_to_world[:3, :3] @ box[:3] + cam_to_world[:3, 3], box[3:6], angles])


PARSERS: Mapping[str, AnswerParser] = {"line": parse_line, "anywhere": parse_anywhere}
ANGLES: Mapping[str, BoxTransform] = {"zxy": extrinsic_to_world, "ZXY": camera_to_world}
"""``zxy`` as VG-LLM's evaluator interprets the angles, ``ZXY`` as its labels are written."""


def _json_objects(text: str) -> Iterator[Any]:
    """All JSON objects in a text, by position of their opening brace; nested ones too."""
    decoder = json.JSONDecoder()
    for brace in re.finditer("{", text):
        try:
            value, _ = decoder.raw_decode(text, brace.start())
        except (ValueError, RecursionError):
            continue  # no valid object begins at this brace
        yield value


def _grounding(value: Any) -> Grounding:
    """The answer in a decoded value. Raises AnswerError; the frame's range is not checked."""
    if not isinstance(value, dict):
        raise AnswerError("it is not a dictionary")
    frame, box = value.get("frame"), value.get("bbox_3d")
    if not isinstance(frame, int) or isinstance(frame, bool):
        raise AnswerError("frame is not an integer")
    try:
        numbers = _BOX.validate_python(box, strict=True)  # strict: neither bool nor str is a number
    except ValidationError as error:
        raise AnswerError("bbox_3d is not a list of 9 numbers") from error
    return Grounding(frame, np.array(numbers))


def _in_range(answer: Grounding, frame_count: int) -> Grounding:
    if not 0 <= answer.frame < frame_count:
        raise AnswerError("frame is out of range")
    return answer
