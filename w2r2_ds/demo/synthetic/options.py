"""Options of a synthetic data set, and the names and seeds of its scenes."""

from __future__ import annotations

from dataclasses import dataclass

SPLITS = ("train", "val")
_VAL_START = 5000
"""Number of the first validation scene."""


@dataclass(frozen=True)
class Options:
    """All options that change the content of a data set. ``image_size`` is width and height in pixels."""

    seed: int
    train_scenes: int
    val_scenes: int
    image_size: tuple[int, int]
    frames_per_scene: int

    def __post_init__(self) -> None:
        """Raise ValueError with the option and its range if an option is out of range."""
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; it must be 0 or more")
        if not (1 <= self.train_scenes <= _VAL_START and 1 <= self.val_scenes <= _VAL_START):
            raise ValueError(f"train_scenes and val_scenes must each be between 1 and {_VAL_START}")
        if len(self.image_size) != 2 or min(self.image_size) < 32:
            raise ValueError(f"image_size is {self.image_size}; it must be a width and a height of at least 32 pixels")
        if self.frames_per_scene < 2:
            raise ValueError(f"frames_per_scene is {self.frames_per_scene}; it must be at least 2")


def scene_id(split: str, index: int) -> str:
    """Name of a scene as in ScanNet; validation scenes start at `_VAL_START`, so that names are unique."""
    return f"scene{index + _VAL_START * SPLITS.index(split):04d}_00"


def scene_seed(seed: int, split: str, index: int) -> tuple[int, int, int]:
    """Seed of a scene's random generator, different for every scene of both splits."""
    return (seed, SPLITS.index(split), index)
