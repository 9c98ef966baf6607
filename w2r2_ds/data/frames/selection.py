"""Which frames of a scene a sample sees: five protocols behind ``choose``.

``uniform``     evenly spread over the scene, the same for all samples of a scene (Video-3D-LLM).
``vgllm``       a random start and a fixed stride, drawn for every sample until a frame sees the object (VG-LLM).
``scene_sets``  a few fixed draws per scene, of which a sample gets one that sees its object: the samples of a scene
                share frames (and what is computed from them), yet do not all see the same ones.
``coverage``    the few frames that see most of the scene (Video-3D-LLM's ``mc``), the same for all its samples.
``list``        frames that a file names for every scene.

Where a protocol draws, it draws from (seed, scene, key): neither the order of the samples nor the process matters.
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

FrameProtocol = Literal["uniform", "vgllm", "scene_sets", "coverage", "list"]

REDRAWS = 20
"""How often VG-LLM draws again when no drawn frame sees the object."""


@dataclass(frozen=True)
class FrameOptions:
    """How frames are chosen.

    Attributes:
        protocol: see the module.
        count: frames per sample; fewer where the scene has fewer, the ratio is reached or the list is shorter.
        seed: of ``vgllm`` and ``scene_sets``.
        sets: sets per scene of ``scene_sets``.
        ratio: share of the scene's voxels at which ``coverage`` stops, in (0, 1].
        voxel: edge length of the voxels of ``coverage``, metres.
        file: of ``list``: JSON, ``{scene: [frame numbers]}``, numbers as in the file names, in the order of viewing.
    """

    protocol: FrameProtocol
    count: int
    seed: int = 0
    sets: int = 4
    ratio: float = 0.9
    voxel: float = 0.1
    file: Path | None = None

    def check(self) -> None:
        """Raise ``ValueError`` for options that cannot be; the message names the option."""
        if self.protocol not in get_args(FrameProtocol):
            raise ValueError(
                f"frames.protocol is {self.protocol!r}; it must be one of {', '.join(get_args(FrameProtocol))}"
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


def choose(options: FrameOptions, scene: Scene, key: str, seen: frozenset[int] | None) -> list[int] | None:
    """Positions in ``scene.frames`` of the frames that a sample sees, each once, in the order in which it sees them.

    Args:
        options: checked options.
        scene: the candidates are its frames; all of them are taken where they are fewer than ``options.count``.
        key: what tells this sample from the others of the scene; samples of equal keys see equal frames.
        seen: positions that see the sample's object; None if there is none, or if the sample is kept whatever it sees.

    Returns:
        the positions, or None if no frame that could have been chosen sees the object: none of the scene, or with
        ``scene_sets`` none of the sets. With ``uniform``, ``coverage`` and ``list``, which do not look at the object, a
        choice may miss an object that the scene shows.

    Raises:
        ValueError: see ``covering_frames`` and ``listed``.
    """
    if seen is not None and not seen:
        return None
    match options.protocol:
        case "uniform":
            return uniform(len(scene.frames), options.count)
        case "vgllm":
            return vgllm(len(scene.frames), options.count, _generator(options.seed, scene.scene_id, key), seen)
        case "scene_sets":
            sets = scene_sets(len(scene.frames), options.count, options.sets, options.seed, scene.scene_id)
            return assign(sets, key, seen)
        case "coverage":
            return list(covering_frames(scene, options.count, options.ratio, options.voxel))
        case "list":
            assert options.file is not None, "check() was not called"
            return listed(options.file, scene, options.count)


def uniform(total: int, count: int) -> list[int]:
    """``count`` of ``total`` positions, the first and the last included, rounded down (Video-3D-LLM's rule)."""
    return [int(i) for i in np.linspace(0, total - 1, min(count, total), dtype=int)]


def vgllm(total: int, count: int, rng: np.random.Generator, seen: frozenset[int] | None) -> list[int]:
    """VG-LLM's draw: from a random start, every ``total // count``-th position, around the end of the scene.

    Drawn again up to ``REDRAWS`` times until one position sees the object. If none ever does, the last position of the
    last draw gives way to the first of the scene that sees it, and the positions are sorted. Where there are fewer
    frames than asked for, all are taken, from the random start on. Two accidents of VG-LLM's code are left out: the
    start 0 is drawn twice as often as any other, and the last draw loses a position without being looked at.

    Args:
        total: frames of the scene.
        count: frames wanted.
        rng: source of the starts.
        seen: positions that see the object, not empty; None if that does not matter.
    """
    drawn: list[int] = []
    for _ in range(1 + REDRAWS):
        drawn = _strided(total, count, int(rng.integers(total)))
        if seen is None or not seen.isdisjoint(drawn):
            return drawn
    assert seen is not None
    return sorted([*drawn[:-1], min(seen)])


def _strided(total: int, count: int, start: int) -> list[int]:
    stride = max(1, total // count)
    return [(start + i * stride) % total for i in range(min(count, total))]


def scene_sets(total: int, count: int, sets: int, seed: int, scene_id: str) -> list[list[int]]:
    """The ordered sets of positions among which the samples of a scene are divided.

    Each set is spread evenly over the whole scene, its stride being ``total / count`` without rounding. The sets' first
    positions divide one stride evenly, so that together they see ``sets * count`` evenly spread frames, or every frame
    if there are no more. Each set is then rotated to begin in another part of the scene (a geometry encoder may take
    the first camera for the world). Where all of this begins is drawn from (seed, scene).

    Returns:
        ``sets`` lists of ``min(count, total)`` distinct positions.
    """
    rng = _generator(seed, scene_id, "scene_sets")
    size = min(count, total)
    phase, turn = int(rng.integers(total)), int(rng.integers(size))
    made = []
    for number in range(sets):
        # whole numbers only: a rounded quotient could repeat a position
        spread = [((i * sets + number) * total + phase) // (size * sets) for i in range(size)]
        first = (turn + number * size // sets) % size
        made.append(spread[first:] + spread[:first])
    return made


def assign(sets: list[list[int]], key: str, seen: frozenset[int] | None) -> list[int] | None:
    """The set in which most frames see the object; a hash of the key decides between equal ones.

    Args:
        sets: not empty.
        key: what tells this sample from the others of the scene.
        seen: positions that see the object, or None if every set is as good as any other.

    Returns:
        one of ``sets``, or None if no frame of any set sees the object.
    """
    seeing = [1 if seen is None else len(seen.intersection(positions)) for positions in sets]
    if not max(seeing):
        return None
    best = [positions for positions, number in zip(sets, seeing, strict=True) if number == max(seeing)]
    return best[_hash(key) % len(best)]


def listed(file: Path, scene: Scene, count: int) -> list[int]:
    """The positions of the frames that a JSON file names for a scene, in the file's order.

    Raises:
        ValueError: the file is unreadable, leaves the scene out, or names for it no frames, more than ``count``, one
            that the scene does not have (or only without a valid pose), or one twice.
    """
    frames = _read_list(file)
    if scene.scene_id not in frames:
        raise ValueError(f"{file}: there is no scene {scene.scene_id}; add its frame numbers or leave the scene out")
    numbers = frames[scene.scene_id]
    where = f"{file}: scene {scene.scene_id}"
    if not isinstance(numbers, list) or not numbers or any(type(number) is not int for number in numbers):
        raise ValueError(f"{where} must have a list of one or more frame numbers; correct the entry")
    if len(numbers) > count:
        raise ValueError(f"{where} has {len(numbers)} frames, but at most {count} are asked for; raise frames.count")
    positions = {frame.index: position for position, frame in enumerate(scene.frames)}
    for i, number in enumerate(numbers):
        if number not in positions:
            raise ValueError(
                f"{where} names frame {number}, which is not among its {len(positions)} usable frames "
                f"({scene.dropped_frames} others have no valid pose); correct the list or extract the frame"
            )
        if number in numbers[:i]:
            raise ValueError(f"{where} names frame {number} twice; remove one")
    return [positions[number] for number in numbers]


@lru_cache(maxsize=1)
def _read_list(file: Path) -> dict[str, Any]:
    try:
        frames = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{file} does not exist; correct frames.file") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} is not readable JSON; write it again ({error})") from None
    if not isinstance(frames, dict):
        raise ValueError(f"{file} must hold a JSON object {{scene: [frame numbers]}}, not a {type(frames).__name__}")
    return frames


def _hash(*parts: object) -> int:
    """A whole number of 128 bits that is the same in every process (Python's ``hash`` of a string is not)."""
    text = json.dumps([str(part) for part in parts])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "big")


def _generator(seed: int, scene_id: str, key: str) -> np.random.Generator:
    return np.random.default_rng(_hash(seed, scene_id, key))
