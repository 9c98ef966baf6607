"""Selection of the frames of a sample: five sampling methods behind `select_frames`.

``uniform``     frames evenly spread over the scene, the same for all samples of a scene (Video-3D-LLM).
``vgllm``       frames with a random start and a fixed stride per sample, redrawn until one shows the object (VG-LLM).
``scene_sets``  a few fixed sets per scene; a sample gets the set with the most frames that show its object.
                Samples share few distinct frame sets, so features are reused.
``coverage``    the few frames that cover most of the scene (Video-3D-LLM's ``mc``), the same for all its samples.
``list``        frames that a file lists for every scene.

Random draws are seeded by (seed, scene, key): they depend on neither the order of the samples nor the process.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from w2r2_ds.data.frames.coverage import covering_frames
from w2r2_ds.data.sources.scannet import Scene
from w2r2_ds.utils.files.json_io import read_json_object

FrameSampling = Literal["uniform", "vgllm", "scene_sets", "coverage", "list"]

REDRAWS = 20
"""Maximum number of further draws of ``vgllm`` while no drawn frame shows the object."""


@dataclass(frozen=True)
class FrameOptions:
    """Options of frame selection.

    Attributes:
        protocol: frame sampling method: uniform, vgllm, scene_sets, coverage or list.
        count: frames per sample; fewer if the scene has fewer, the ratio is reached or the list is shorter.
        seed: random seed of ``vgllm`` and ``scene_sets``.
        sets: number of sets per scene of ``scene_sets``.
        ratio: fraction of the scene's voxels at which ``coverage`` stops, in (0, 1].
        voxel: edge length of the voxels of ``coverage``, metres.
        file: JSON file of ``list``, ``{scene: [frame numbers]}``; numbers as in the frames' file names, in the order of
            the model's input.
    """

    protocol: FrameSampling = "vgllm"
    count: int = 32
    seed: int = 0
    sets: int = 4
    ratio: float = 0.9
    voxel: float = 0.1
    file: Path | None = None

    def check(self) -> None:
        """Raise ValueError that names an option which is out of range or does not fit the sampling method."""
        if self.protocol not in get_args(FrameSampling):
            raise ValueError(
                f"frames.protocol is {self.protocol!r}; it must be one of {', '.join(get_args(FrameSampling))}"
            )
        for name in ("count", "sets"):
            if getattr(self, name) < 1:
                raise ValueError(f"frames.{name} is {getattr(self, name)}; it must be at least 1")
        if self.seed < 0:
            raise ValueError(f"frames.seed is {self.seed}; it must not be negative")
        if not 0 < self.ratio <= 1:
            raise ValueError(f"frames.ratio is {self.ratio}; it must be above 0 and at most 1")
        if not 0 < self.voxel < float("inf"):
            raise ValueError(f"frames.voxel is {self.voxel}; it must be a positive number of metres")
        if (self.file is None) == (self.protocol == "list"):
            raise ValueError("frames.file must be set for frames.protocol 'list', and only for it")


def select_frames(options: FrameOptions, scene: Scene, key: str, visible: frozenset[int] | None) -> list[int] | None:
    """Positions in ``scene.frames`` of a sample's frames, each once, in the order of the model's input.

    Args:
        options: options that `FrameOptions.check` accepted.
        scene: with ``uniform``, ``vgllm`` and ``scene_sets``, all its frames are selected if it has at most ``count``.
        key: sample key; seeds the sample's draw.
        visible: positions of the frames in which the sample's object is visible; None if visibility does not matter.

    Returns:
        The positions. None if the object is visible in no frame of the scene, or with ``scene_sets`` in no frame of
        any set. ``uniform``, ``coverage`` and ``list`` do not use visibility, so possibly none of their frames shows
        the object.

    Raises:
        ValueError: see `covering_frames` and `frames_from_file`.
    """
    if visible is not None and not visible:
        return None
    match options.protocol:
        case "uniform":
            return uniform(len(scene.frames), options.count)
        case "vgllm":
            return vgllm(len(scene.frames), options.count, _generator(options.seed, scene.scene_id, key), visible)
        case "scene_sets":
            sets = scene_sets(len(scene.frames), options.count, options.sets, options.seed, scene.scene_id)
            return assign_set(sets, key, visible)
        case "coverage":
            return list(covering_frames(scene, options.count, options.ratio, options.voxel))
        case "list":
            assert options.file is not None, "check() was not called"
            return frames_from_file(options.file, scene, options.count)


def uniform(total: int, count: int) -> list[int]:
    """``count`` evenly spaced positions of ``total``, including the first and the last, rounded down (Video-3D-LLM)."""
    return [int(i) for i in np.linspace(0, total - 1, min(count, total), dtype=int)]


def vgllm(total: int, count: int, rng: np.random.Generator, visible: frozenset[int] | None) -> list[int]:
    """VG-LLM's draw: every ``total // count``-th position from a random start on, modulo ``total``.

    The draw is repeated up to ``REDRAWS`` times until a position shows the object. If none does, the last position of
    the last draw is replaced by the first position that shows it, and the positions are sorted. If the scene has fewer
    than ``count`` frames, all are selected, from the random start on.

    Two artefacts of VG-LLM's code are not reproduced: start 0 is drawn twice as often as any other, and the last draw
    loses a position even if the object is visible in it.

    Args:
        total: number of frames of the scene.
        count: number of frames to select.
        rng: random generator of the starts.
        visible: positions in which the object is visible, not empty; None if visibility does not matter.
    """
    drawn: list[int] = []
    for _ in range(1 + REDRAWS):
        drawn = _strided(total, count, int(rng.integers(total)))
        if visible is None or not visible.isdisjoint(drawn):
            return drawn
    assert visible is not None
    return sorted([*drawn[:-1], min(visible)])


def _strided(total: int, count: int, start: int) -> list[int]:
    """Positions from `start` on with stride ``total // count``, modulo ``total``; at most ``total`` of them."""
    stride = max(1, total // count)
    return [(start + i * stride) % total for i in range(min(count, total))]


def scene_sets(total: int, count: int, sets: int, seed: int, scene_id: str) -> list[list[int]]:
    """Ordered sets of positions of a scene; every sample of the scene gets one of them.

    Each set is spread evenly over the whole scene, with the exact stride ``total / count``. The sets are shifted by
    equal parts of a stride, so their union is ``sets * count`` evenly spaced frames, or all frames if there are fewer.
    Each set is then rotated, so that sets begin in different parts of the scene, because a geometry encoder may use the
    first camera as the world frame. Shift and rotation are drawn at random from (seed, scene).

    Args:
        total: number of frames of the scene.
        count: number of frames of a set.
        sets: number of sets.
        seed: random seed.
        scene_id: name of the scene.

    Returns:
        ``sets`` lists of ``min(count, total)`` distinct positions.
    """
    rng = _generator(seed, scene_id, "scene_sets")
    size = min(count, total)
    shift, rotation = int(rng.integers(total)), int(rng.integers(size))
    result = []
    for index in range(sets):
        # The i-th position is (i + index / sets) strides of total / size, plus the shift of the scene. In integers,
        # because a rounded floating-point quotient could repeat a position.
        spread = [((i * sets + index) * total + shift) // (size * sets) for i in range(size)]
        first = (rotation + index * size // sets) % size
        result.append(spread[first:] + spread[:first])
    return result


def assign_set(sets: list[list[int]], key: str, visible: frozenset[int] | None) -> list[int] | None:
    """The set with the most frames that show the object; ties are broken by a hash of the key.

    Args:
        sets: lists of positions, at least one.
        key: sample key.
        visible: positions in which the object is visible; None if visibility does not matter.

    Returns:
        One of ``sets``, or None if no frame of any set shows the object.
    """
    # Without visibility all sets are equal, and the hash spreads the samples over them.
    num_visible = [1 if visible is None else len(visible.intersection(positions)) for positions in sets]
    if not max(num_visible):
        return None
    best = [positions for positions, count in zip(sets, num_visible, strict=True) if count == max(num_visible)]
    return best[_hash(key) % len(best)]


def frames_from_file(file: Path, scene: Scene, count: int) -> list[int]:
    """Positions of the frames that a JSON file lists for a scene, in the file's order.

    Args:
        file: JSON file, ``{scene: [frame numbers]}``.
        scene: scene whose frames are listed.
        count: maximum number of frames.

    Raises:
        ValueError: the file is unreadable or lacks the scene, or the scene's list is empty, has more than ``count``
            frames, an unknown frame, one without valid pose, or a duplicate.
    """
    frames = _read_list(file)
    if scene.scene_id not in frames:
        raise ValueError(f"{file}: there is no scene {scene.scene_id}; add its frame numbers")
    numbers = frames[scene.scene_id]
    location = f"{file}: scene {scene.scene_id}"
    if not isinstance(numbers, list) or not numbers or any(type(number) is not int for number in numbers):
        raise ValueError(f"{location} must have a list of one or more frame numbers; correct the entry")
    if len(numbers) > count:
        raise ValueError(f"{location} has {len(numbers)} frames, more than frames.count ({count}); raise frames.count")
    positions = {frame.index: position for position, frame in enumerate(scene.frames)}
    for i, number in enumerate(numbers):
        if number not in positions:
            raise ValueError(
                f"{location} names frame {number}, which is not among its {len(positions)} usable frames "
                f"({scene.frames_without_pose} others have no valid pose); correct the list or extract the frame"
            )
        if number in numbers[:i]:
            raise ValueError(f"{location} names frame {number} twice; remove one")
    return [positions[number] for number in numbers]


@lru_cache(maxsize=1)
def _read_list(file: Path) -> dict[str, Any]:
    """Content of a ``list`` file; cached, because it is read for every sample."""
    return read_json_object(file, "a JSON object {scene: [frame numbers]}, given as frames.file")


def _hash(*parts: object) -> int:
    """A 128-bit hash that is the same in every process; Python's ``hash`` of a string is salted per process."""
    text = json.dumps([str(part) for part in parts])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "big")


def _generator(seed: int, scene_id: str, key: str) -> np.random.Generator:
    return np.random.default_rng(_hash(seed, scene_id, key))
