"""Options of a synthetic data set, and the names and seeds of its scenes."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal

SPLITS = ("train", "val")
SHIFTS = ("furniture_scale", "focal_length", "room_scale", "camera", "position_prior")
"""Shifts of the validation rooms; ``shift/variants.py`` explains them."""
QUESTION_KINDS = ("color", "count", "nearest", "between", "larger", "side", "where")
"""Kinds of questions of a data set by default; ``questions.py`` explains them."""
_VAL_START = 5000
"""Number of the first validation scene."""
_PARAMETERS = {
    "furniture_scale": ("furniture_factor",),
    "focal_length": ("focal_factor",),
    "room_scale": ("room_factor",),
    "camera": ("camera_drop", "camera_flatter"),
    "position_prior": ("prior", "prior_strength"),
}
"""Shift -> its parameters in `ShiftOptions`."""
_RANGES = {
    "furniture_factor": (1.1, 2.0),
    "focal_factor": (0.5, 2.0),
    "room_factor": (0.4, 2.5),
    "camera_drop": (0.0, 0.8),
    "camera_flatter": (0.0, 15.0),
    "prior_strength": (0.5, 1.0),
}


@dataclass(frozen=True)
class ShiftOptions:
    """Shifted validation splits of a data set, ``val_NAME`` for each name, and their strengths.

    Attributes:
        names: names from `SHIFTS`. ``position_prior`` changes the training rooms, so it must be the only one.
        furniture_factor: every object is scaled by a factor between this and its square root, or their inverses.
        focal_factor: factor on the focal length.
        room_factor: factor on all lengths of a room.
        camera_drop: distance in metres by which cameras are lowered.
        camera_flatter: angle in degrees by which cameras are turned up.
        prior: attribute of an object on which its side of the room depends.
        prior_strength: share of the objects on the side of their attribute; 0.5 plants nothing.
    """

    names: tuple[str, ...] = ()
    furniture_factor: float = 1.5
    focal_factor: float = 1.4
    room_factor: float = 0.7
    camera_drop: float = 0.5
    camera_flatter: float = 10.0
    prior: Literal["color", "class"] = "color"
    prior_strength: float = 0.9

    def __post_init__(self) -> None:
        """Raise ValueError with the option if a name or a strength is invalid, or a strength has no shift."""
        unknown = [name for name in self.names if name not in SHIFTS]
        if unknown or len(set(self.names)) < len(self.names):
            raise ValueError(f"shift is {list(self.names)}; it must have different names of {', '.join(SHIFTS)}")
        if "position_prior" in self.names and len(self.names) > 1:
            raise ValueError(
                f"shift is {list(self.names)}; position_prior changes the training rooms, so it needs its own folder"
            )
        for name, (low, high) in _RANGES.items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be between {low} and {high}")
        for name in ("focal_factor", "room_factor"):
            if getattr(self, name) == 1:
                raise ValueError(f"{name} is 1, which shifts nothing")
        if self.camera_drop == self.camera_flatter == 0:
            raise ValueError("camera_drop and camera_flatter are both 0, which shifts nothing")
        if self.prior not in ("color", "class"):
            raise ValueError(f"prior is {self.prior!r}; it must be color or class")
        for shift, names in _PARAMETERS.items():
            for name in names:
                if shift not in self.names and getattr(self, name) != getattr(ShiftOptions, name):
                    raise ValueError(f"{name} is {getattr(self, name)}, but shift does not have {shift}, which uses it")

    def parameters(self, name: str) -> dict[str, Any]:
        """Parameters of one shift and their values."""
        return {parameter: getattr(self, parameter) for parameter in _PARAMETERS[name]}


@dataclass(frozen=True)
class Options:
    """All options that change the content of a data set.

    Attributes:
        seed: random seed.
        train_scenes: number of training rooms.
        val_scenes: number of validation rooms.
        image_size: width and height in pixels.
        frames_per_scene: number of images per room.
        objects: factor on the number of objects of every class.
        shift: shifted validation splits.
        sentences: referring expressions: ``relations`` to other objects, or ``phrases`` of colour and class.
        world_frame: origin and direction of the world: ``center`` or ``corner``, see ``world_frame.py``.
        questions: kinds of questions, from `QUESTION_KINDS` or ``unique_color``.
    """

    seed: int
    train_scenes: int
    val_scenes: int
    image_size: tuple[int, int]
    frames_per_scene: int
    objects: float = 1.0
    shift: ShiftOptions = field(default=ShiftOptions())
    sentences: Literal["relations", "phrases"] = "relations"
    world_frame: Literal["center", "corner"] = "center"
    questions: tuple[str, ...] = QUESTION_KINDS

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
        if not 0.7 <= self.objects <= 2:
            raise ValueError(f"objects is {self.objects}; it must be between 0.7 and 2")
        for name, choices in (("sentences", ("relations", "phrases")), ("world_frame", ("center", "corner"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be {' or '.join(choices)}")
        kinds = (*QUESTION_KINDS, "unique_color")
        if not self.questions or len(set(self.questions) & set(kinds)) < len(self.questions):
            raise ValueError(f"questions is {list(self.questions)}; it must have different kinds of {', '.join(kinds)}")
        if {"color", "unique_color"} <= set(self.questions):
            raise ValueError("questions has color and unique_color, but color includes the questions of unique_color")
        if self.world_frame == "corner" and "position_prior" in self.shift.names:
            raise ValueError(
                "world_frame is corner, but shift has position_prior, which places objects by their side of the world; "
                "use center, because corner turns the world by the first camera"
            )

    @property
    def splits(self) -> tuple[str, ...]:
        """``train``, ``val``, and ``val_NAME`` for every shift."""
        return (*SPLITS, *(f"val_{name}" for name in self.shift.names))


def defaults() -> dict[str, Any]:
    """The options that have a default, with these."""
    return {each.name: each.default for each in fields(Options) if each.default is not MISSING}


def scene_id(split: str, index: int) -> str:
    """Name of a scene as in ScanNet; validation scenes start at `_VAL_START`, so that names are unique.

    The scenes of a shifted split are further scans of the validation room: ``scene5003_04`` is ``scene5003_00`` with
    the fourth shift of `SHIFTS`.
    """
    base, _, shift = split.partition("_")
    scan = SHIFTS.index(shift) + 1 if shift else 0
    return f"scene{index + _VAL_START * SPLITS.index(base):04d}_{scan:02d}"


def scene_seed(seed: int, split: str, index: int) -> tuple[int, int, int]:
    """Seed of a scene's random generator, different for every scene of ``train`` and ``val``."""
    return (seed, SPLITS.index(split), index)
