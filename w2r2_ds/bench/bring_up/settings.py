"""Options of ``w2r2 bench bring_up``, and the sizes that they select on a GPU and on a CPU."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import torch

from w2r2_ds.bench.harness import find_device
from w2r2_ds.bench.shapes import TINY, Shape, find_shapes


@dataclass(frozen=True)
class Settings:
    """Device and sizes of the measurements.

    Attributes:
        device: the GPU, or the CPU.
        shapes: names of shapes (`shapes.py`).
        frames: numbers of frames per sample.
        questions: numbers K of questions per packed sequence.
        rounds: number of runs per case.
        steps: number of training steps of varying lengths, for the comparison of SDPA backends.
        deadline: value of `time.perf_counter` after which nothing more is measured.
    """

    device: torch.device
    shapes: tuple[str, ...]
    frames: tuple[int, ...]
    questions: tuple[int, ...]
    rounds: int
    steps: int
    deadline: float

    @classmethod
    def of(
        cls,
        shapes: list[str] | None,
        frames: list[int] | None,
        questions: list[int],
        rounds: int,
        steps: int,
        seconds: float = 600.0,
    ) -> Settings:
        """Settings of the options; by default the real architectures on a GPU, and the shape `tiny` on a CPU.

        The deadline is `seconds` from now.

        Raises:
            ValueError: a shape does not exist, or a number is not positive or too large for the shape.
        """
        device = find_device()
        cuda = device.type == "cuda"
        shapes = shapes or (["3b", "7b"] if cuda else ["tiny"])
        frames = frames or ([8, 16, 24] if cuda else [2])
        for option, numbers in {"rounds": [rounds], "steps": [steps], "questions": questions}.items():
            if not numbers or min(numbers) < 1:
                raise ValueError(f"--{option} is {numbers[0] if len(numbers) == 1 else numbers}; it must be positive.")
        for shape in shapes:
            find_shapes(shape, frames)
        return cls(device, tuple(shapes), tuple(frames), tuple(questions), rounds, steps, time.perf_counter() + seconds)

    def remaining(self) -> float:
        """Seconds until the deadline; at least 0."""
        return max(self.deadline - time.perf_counter(), 0.0)

    def expired(self) -> bool:
        """Whether the deadline has passed."""
        return self.remaining() == 0

    def all_shapes(self) -> list[Shape]:
        """Every shape with the first number of frames."""
        return [find_shapes(name, [self.frames[0]])[0] for name in self.shapes]

    def shallow_shape(self) -> Shape:
        """The first shape with two decoder layers, a vision tower of two blocks and a tiny VGGT.

        For measurements that depend on the sizes of a layer, but not on the number of layers.
        """
        return replace(self.all_shapes()[0], layers=2, vision_depth=2, vision_full=(1,), vggt=TINY.vggt)
