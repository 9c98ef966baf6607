"""Data loaders for training, validation and generation: from the data configuration to batches on every rank."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch.utils.data import Dataset

from w2r2_ds.config.schema import DataConfig
from w2r2_ds.data.batching.collate import Collator, PositionIds
from w2r2_ds.data.batching.packing import Grouping, groups_by_frames, separate_groups
from w2r2_ds.data.dataset import SampleDataset
from w2r2_ds.data.frames.anchor_inputs import AnchorCollator
from w2r2_ds.data.frames.geometry_augmentation import AugmentedDataset, GeometryAugmentation, NumberedBatches
from w2r2_ds.data.frames.typical_box import TypicalBox
from w2r2_ds.data.processor import Features, Processor
from w2r2_ds.data.reraising_loader import ReraisingDataLoader, ignore_stop_signals
from w2r2_ds.data.sampler import GlobalBatchSampler
from w2r2_ds.data.shared_memory import FeatureSizes, batch_bytes
from w2r2_ds.data.visual_inputs import VisualPreprocessor
from w2r2_ds.models.build import VlmFrontend
from w2r2_ds.types.batch import Batch
from w2r2_ds.types.sample import Sample

LENGTH_MULTIPLE = 64
"""The length of training sequences is rounded up to a multiple of this number.

Texts differ in length, so nearly every micro-batch would have another length. With few different lengths, PyTorch's
caching allocator reuses its blocks. Padding changes no result but costs 32 tokens per sequence on average, 0.5 % of 24
frames of 518 x 392 and their question; a multiple of 128 would cost twice as much. 64 is also a multiple of the tiles
of GPU kernels for matrix products, and of the alignment of masks in memory-efficient attention.
"""


def make_processor(frontend: VlmFrontend, config: DataConfig) -> Processor:
    """The `Processor` of a VLM for a data configuration."""
    return Processor(frontend.tokenizer, frontend.family, frontend.vision, frontend.geometry, config, frontend.cache)


def make_position_ids(frontend: VlmFrontend, config: DataConfig) -> PositionIds:
    """Function that computes the multimodal position ids of padded sequences by the VLM family's rule; picklable."""
    seconds = frontend.vision.temporal_patch_size / config.video_fps
    return functools.partial(frontend.family.position_ids, frontend.meta, seconds_per_grid=seconds)


def visual_kind(config: DataConfig) -> str:
    """`Visuals.kind` for the option `data.visual`."""
    return {"images": "image", "video": "video"}[config.visual]


def choose_grouping(config: DataConfig) -> Grouping | None:
    """Groups of samples in a packed sequence: with shared frames, or one sample each; None for padded sequences."""
    if config.questions_per_scene > 1:
        return groups_by_frames
    return separate_groups if config.packing else None


def make_collate(
    frontend: VlmFrontend,
    config: DataConfig,
    with_prompts: bool = False,
    with_answer: bool = True,
    pad_to_multiple_of: int = 1,
    typical: TypicalBox | None = None,
) -> Collator:
    """The `Collator` of a VLM for a data configuration.

    Args:
        frontend: tokenizer, vision and geometry specs.
        config: data configuration.
        with_prompts: also make `Batch.prompts`, to decode answers during training.
        with_answer: True for samples with answers (training), False for left-padded prompts (generation).
        pad_to_multiple_of: see `Collator`.
        typical: typical box of the training set, to make `Batch.anchors`; None for batches without.
    """
    preprocessor = VisualPreprocessor(frontend.family, frontend.vision, frontend.geometry, config)
    return Collator(
        pad_id=frontend.tokenizer.pad_token_id,
        kind=visual_kind(config),
        position_ids=make_position_ids(frontend, config) if with_answer else None,
        vision=frontend.vision,
        geometry=frontend.geometry,
        family=frontend.family,
        with_prompts=with_prompts,
        grouping=choose_grouping(config) if with_answer else None,
        pad_to_multiple_of=pad_to_multiple_of,
        anchors=None if typical is None else AnchorCollator(preprocessor, typical),
    )


def feature_sizes(frontend: VlmFrontend) -> FeatureSizes | None:
    """Sizes of the features in the frontend's cache; None without a cache."""
    if frontend.cache is None:
        return None
    channels = frontend.family.cache_channels(frontend.meta.config) if frontend.cache.vision else 0
    return FeatureSizes(
        frontend.geometry.patch_size,
        frontend.geometry.feature_dim * frontend.dtype.itemsize,
        frontend.vision.patch_size * frontend.vision.merge_size,
        channels * frontend.dtype.itemsize,
    )


def train_loader(
    samples: Sequence[Sample],
    frontend: VlmFrontend,
    config: DataConfig,
    sampler: GlobalBatchSampler,
    with_prompts: bool = False,
    typical: TypicalBox | None = None,
    augmentation: GeometryAugmentation | None = None,
) -> ReraisingDataLoader[Batch]:
    """Loader of this rank's training micro-batches.

    Args:
        samples: samples of the training split.
        frontend: tokenizer, vision and geometry specs, feature cache.
        config: data configuration.
        sampler: this rank's micro-batches of sample indices.
        with_prompts: also make `Batch.prompts`, to decode answers during training.
        typical: typical box of the training set, to make `Batch.anchors`; None for batches without.
        augmentation: changes geometry and answers; None for samples as they are.
    """
    dataset: Dataset[Features] = SampleDataset(samples, make_processor(frontend, config), with_answer=True)
    if augmentation is not None:
        dataset = AugmentedDataset(samples, make_processor(frontend, config), augmentation)
    return ReraisingDataLoader(
        dataset,
        batch_sampler=sampler if augmentation is None else NumberedBatches(sampler),
        collate_fn=make_collate(frontend, config, with_prompts, pad_to_multiple_of=LENGTH_MULTIPLE, typical=typical),
        num_workers=config.workers,
        worker_init_fn=ignore_stop_signals,
        prefetch=config.prefetch,
        # Samples that share their frames share the inputs of the encoders too.
        batch_bytes=batch_bytes(samples, sampler.micro_batch, config, feature_sizes(frontend), frontend.geometry)
        // config.questions_per_scene,
        pin_memory=torch.cuda.is_available(),  # makes the copies of `Batch.to` asynchronous
        persistent_workers=config.workers > 0,
        # The iterator draws a base seed for its workers, by default from the global random state. A separate generator
        # keeps that state as the checkpoint restored it.
        generator=torch.Generator(),
    )


def labeled_loader(
    samples: Sequence[Sample],
    frontend: VlmFrontend,
    config: DataConfig,
    batch_size: int,
    with_prompts: bool = False,
    typical: TypicalBox | None = None,
) -> ReraisingDataLoader[Batch]:
    """Loader of batches with answers, samples in order; for measurements on fixed samples.

    Args:
        samples: samples with answers.
        frontend: tokenizer, vision and geometry specs, feature cache.
        config: data configuration.
        batch_size: samples per batch.
        with_prompts: also make `Batch.prompts`, to decode answers.
        typical: typical box of the training set, to make `Batch.anchors`; None for batches without.
    """
    return ReraisingDataLoader(
        SampleDataset(samples, make_processor(frontend, config), with_answer=True),
        batch_size=batch_size,
        collate_fn=make_collate(frontend, config, with_prompts, pad_to_multiple_of=LENGTH_MULTIPLE, typical=typical),
        generator=torch.Generator(),
    )


def prompt_loader(
    samples: Sequence[Sample],
    frontend: VlmFrontend,
    config: DataConfig,
    batch_size: int,
    processor: Callable[[Sample, bool], Features] | None = None,
) -> ReraisingDataLoader[Batch]:
    """Loader of left-padded prompts for generation, samples in order.

    Args:
        samples: samples to generate answers for.
        frontend: tokenizer, vision and geometry specs, feature cache.
        config: data configuration.
        batch_size: prompts per batch.
        processor: (sample, with_answer) -> features; by default the result of `make_processor`.
    """
    dataset = SampleDataset(samples, processor or make_processor(frontend, config), with_answer=False)
    return ReraisingDataLoader(
        dataset,
        batch_size=batch_size,
        collate_fn=make_collate(frontend, config, with_answer=False),
        num_workers=config.workers,
        worker_init_fn=ignore_stop_signals,
        prefetch=config.prefetch,
        batch_bytes=batch_bytes(samples, batch_size, config, feature_sizes(frontend), frontend.geometry),
        # As in `train_loader`: validation must not change the random state of the training that continues after it.
        generator=torch.Generator(),
    )
