"""Geometry augmentation: training samples whose point maps and answers are scaled, shifted and turned together.

The pixels stay as they are, so a model that answers from 2D appearance alone is wrong on a changed sample, and a model
that reads its answer off the geometry is right. The cameras move along with the world
(`models/geometry/point_transforms.py`): every pixel still shows the point that belongs to it.

Every change is drawn with a random generator of its own, seeded by the run's seed, the scene group's number in the
sampler's endless list, and the frames. It depends neither on the number of ranks, micro-batches or workers, nor on
whether the run was resumed. The questions of a scene group, which share their frames, share the change.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from torch.utils.data import Dataset, Sampler

from w2r2_ds.config.schema import GeometryAugmentationConfig
from w2r2_ds.data.mixture import Mixture
from w2r2_ds.data.processor import Features
from w2r2_ds.data.sampler import GlobalBatchSampler
from w2r2_ds.data.tasks.base import TASKS
from w2r2_ds.models.geometry.point_transforms import Similarity, change_point_maps, world_change
from w2r2_ds.types.geometry import GeometrySpec
from w2r2_ds.types.sample import Sample
from w2r2_ds.utils.plugins import ImportsPlugins

OPTION = "data.geometry_augmentation"
_DECIMAL = re.compile(r"-?\d+\.\d+")


class GeometryAugmentation:
    """Random changes of the geometry and the answer of training samples.

    Args:
        config: ranges of the changes.
        reference_frame: coordinate system of the point maps (`PointMapSpec`).
        seed: seed of the run.
    """

    def __init__(self, config: GeometryAugmentationConfig, reference_frame: str, seed: int) -> None:
        self.config, self.reference_frame, self.seed = config, reference_frame, seed

    def draw(self, sample: Sample, number: int) -> Similarity | None:
        """The change of a sample's world, or None (by `probability`).

        Args:
            sample: the sample; only its scene and frames are used.
            number: number of the sample's scene group in the sampler's endless list.
        """
        # A cryptographic hash, because Python's own `hash` of a string differs from process to process. File names
        # without folders, so that the data may be moved between two launches of a run.
        key = " ".join([str(self.seed), str(number), sample.scene_id, *(path.name for path in sample.frames)])
        generator = np.random.default_rng(list(hashlib.blake2b(key.encode(), digest_size=16).digest()))
        # Every value is drawn in any case: an option does not change the draws of the others.
        chance, log_scale, angle = generator.random(), *generator.random(2)
        directions = generator.uniform(-1.0, 1.0, 3)
        if chance >= self.config.probability:
            return None
        low, high = np.log(self.config.scale)
        turn = {"none": 0.0, "quarter": np.pi / 2 * np.floor(4 * angle), "any": 2 * np.pi * angle}[self.config.turn]
        return world_change(
            scale=float(np.exp(low + (high - low) * log_scale)),
            shift=tuple(directions * np.array(self.config.shift)),
            turn=float(turn),
        )

    def apply(self, features: Features, cam_to_world: np.ndarray, change: Similarity, number: int) -> Features:
        """Features with changed point maps.

        Args:
            features: features of the changed sample (`Task.change_world`) with unchanged point maps.
            cam_to_world: ``[frames, 4, 4]`` poses of the unchanged sample.
            change: result of `draw`.
            number: the argument of `draw`.
        """
        points = features.visual.geometry_frames
        if points is None:  # a sample without frames
            return features
        changed = change_point_maps(points, change, cam_to_world, self.reference_frame, cameras_move=True)
        visual = dataclasses.replace(features.visual, geometry_frames=changed)
        return dataclasses.replace(features, visual=visual, draw=number)


class AugmentedDataset(ImportsPlugins, Dataset[Features]):
    """Training samples with random changes; its indices are pairs (number of the scene group, sample index).

    Args:
        samples: the samples.
        processor: (sample, with_answer) -> features.
        augmentation: the random changes.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        processor: Callable[[Sample, bool], Features],
        augmentation: GeometryAugmentation,
    ) -> None:
        self.samples, self.processor, self.augmentation = samples, processor, augmentation

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, item: tuple[int, int]) -> Features:
        number, index = item
        sample = self.samples[index]
        change = self.augmentation.draw(sample, number)
        if change is None:
            return self.processor(sample, True)
        try:
            changed = TASKS.find(sample.task).change_world(sample, change)
        except ValueError as error:
            raise ValueError(f"Sample {sample.id} of {sample.task}: {error}") from error
        return self.augmentation.apply(self.processor(changed, True), sample.cam_to_world, change, number)


class NumberedBatches(Sampler[list[tuple[int, int]]]):
    """The micro-batches of a sampler as indices of an `AugmentedDataset`."""

    def __init__(self, sampler: GlobalBatchSampler) -> None:
        self.sampler = sampler

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return self.sampler.numbered()


def make_augmentation(
    config: GeometryAugmentationConfig, geometry: GeometrySpec, seed: int
) -> GeometryAugmentation | None:
    """The augmentation of a run; None if it is off. `check_augmentation` has accepted the options."""
    if not config.enabled:
        return None
    assert geometry.point_maps is not None, "checked at start"
    return GeometryAugmentation(config, geometry.point_maps.reference_frame, seed)


def with_longest_numbers(sample: Sample, config: GeometryAugmentationConfig) -> Sample:
    """The sample with numbers that are at least as long as those of any change, to check its length at start.

    A changed coordinate may have a sign or a further digit: 9.50 becomes -13.30. All decimal numbers of the question
    and the answer count, also those that do not change.
    """
    if not config.enabled:
        return sample
    question, answer = (_longest_numbers(text, config, sample.decimals) for text in (sample.question, sample.answer))
    return dataclasses.replace(sample, question=question, answer=answer)


def _longest_numbers(text: str, config: GeometryAugmentationConfig, decimals: int) -> str:
    numbers = _DECIMAL.findall(text)
    if not numbers:
        return text
    # A turn about the vertical makes a coordinate at most sqrt(2) times the largest one; a text may also stay.
    largest = max(abs(float(number)) for number in numbers)
    limit = max(1.0, 2**0.5 * config.scale[1]) * largest + max(config.shift)
    # Trailing zeros are not written, so a text may have fewer decimals than a changed one.
    decimals = max(decimals, *(len(number.partition(".")[2]) for number in numbers))
    return _DECIMAL.sub(f"-{limit:.{decimals}f}", text)


def check_augmentation(config: GeometryAugmentationConfig, geometry: GeometrySpec, samples: Mixture) -> None:
    """Check at start that the geometry and all answers of a training mixture can be changed.

    Args:
        config: options of the augmentation.
        geometry: input of the geometry encoder.
        samples: training mixture.

    Raises:
        ValueError: the encoder has no point maps, the coordinates do not show a shift or a turn, a task does not
            rewrite its answers, or axis-aligned boxes would be turned by any angle.
    """
    if not config.enabled:
        return
    if geometry.point_maps is None:
        raise ValueError(
            f"{OPTION} changes point maps, but the encoder of model.geometry.name takes images; set it to point_map, "
            f"or remove {OPTION}."
        )
    frame = geometry.point_maps.reference_frame
    if config.moves_world and frame != "world":
        raise ValueError(
            f"{OPTION} shifts or turns the world, which point maps in the coordinates of a camera do not show; set "
            f"model.geometry.reference_frame to world (it is {frame}), or change {OPTION}.scale only."
        )
    for prepared in samples.sets:
        if not len(prepared):
            continue
        sample: Sample = prepared[0]  # the samples of a set have the same task and format
        if not TASKS.find(sample.task).can_change_world:
            raise ValueError(
                f"{OPTION} changes coordinates, but task {sample.task} does not rewrite its texts; define "
                "Task.change_world in its plug-in, or train without this task."
            )
        if config.turn == "any" and sample.kind == "grounding" and sample.box_format == "world":
            raise ValueError(
                f"{OPTION}.turn is any, but the answers of task {sample.task} are axis-aligned boxes in the world; "
                "set it to quarter or none."
            )
