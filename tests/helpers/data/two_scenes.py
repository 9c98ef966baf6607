"""Samples of two scenes, of which two can be paired and one cannot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

PARTNERS = [2, None, 0]
"""Index of the sample whose geometry contrasts with that of each sample of `two_scenes`."""


def two_scenes(samples: Sequence[Any]) -> list[Any]:
    """The three grounding samples (tests/conftest.py), the last in another scene and with as many frames as the first.

    The second has frames of another size, so no sample has the geometry that replaces its own.
    """
    first, second, third = samples
    count = len(first.frames)
    cut = {"frames": third.frames[:count], "cam_to_world": third.cam_to_world[:count]}
    return [first, second, replace(third, scene_id="scene0001_00", **cut)]
