"""Configuration -> samples -> batches: the one place where the data side is put together."""

from __future__ import annotations

import functools
import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from w2r2_ds.config.schema import DataConfig
from w2r2_ds.data.collate import Collator, PositionIds
from w2r2_ds.data.dataset import MANIFEST, PreparedSet
from w2r2_ds.data.mixture import Mixture
from w2r2_ds.data.packing import Grouping, groups_by_frames, separate_groups
from w2r2_ds.data.processor import Features, Processor
from w2r2_ds.data.sampler import GlobalBatchSampler
from w2r2_ds.data.tasks.base import find_task
from w2r2_ds.models.build import VlmFrontend
from w2r2_ds.types.batch import Batch
from w2r2_ds.types.sample import Sample

T = TypeVar("T")


def load_mixture(config: DataConfig, split: str) -> Mixture:
    """The prepared data sets of a split.

    Raises:
        ValueError: one of them is missing or broken or of a task that is not registered, or an epoch is empty.
    """
    sources = {"train": config.train, "val": config.val}[split]
    sets = [PreparedSet(Path(config.root) / source.path, config.root) for source in sources]
    for each in sets:
        find_task(each.task)  # the objective and the scores need the task's class
    mixture = Mixture(sets, [source.weight for source in sources], [source.cap for source in sources])
    if split == "train" and mixture.epoch_size == 0:
        shown = ", ".join(f"{each.folder / MANIFEST} ({len(each)})" for each in sets)
        raise ValueError(
            f"There is nothing to train on: the samples of {shown}, times their weight in data.train, are none; see "
            "there what was left out and prepare the data set again, or raise the weight."
        )
    return mixture


def check_frames_are_shared(mixture: Mixture, questions: int) -> None:
    """Raise ValueError where several questions per scene should share frames that were drawn for every sample."""
    for each in mixture.sets if questions > 1 else ():
        if isinstance(each, PreparedSet) and each.manifest["options"]["frames"].get("protocol") == "vgllm":
            raise ValueError(
                f"{each.folder / MANIFEST}: frames.protocol is vgllm, which draws other frames for every sample, so "
                f"that data.questions_per_scene {questions} finds none to share; prepare the data set with "
                "scene_sets (or uniform, coverage, list), or give 1."
            )


def digests(mixture: Mixture) -> list[str]:
    """What each of the prepared sets of a mixture was made of, as one hash."""
    return [each.digest for each in mixture.sets if isinstance(each, PreparedSet)]


class SampleDataset(Dataset[Features]):
    """Map-style dataset that processes a sample on access.

    Args:
        samples: the samples.
        processor: turns a sample into tensors.
        with_answer: True: prompt and answer (training); False: the prompt only (generation).
    """

    def __init__(
        self, samples: Sequence[Sample], processor: Callable[[Sample, bool], Features], with_answer: bool
    ) -> None:
        self.samples, self.processor, self.with_answer = samples, processor, with_answer

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Features:
        return self.processor(self.samples[index], self.with_answer)


class ReraisingDataLoader(DataLoader[Any], Generic[T]):
    """A DataLoader of collated items `T` that raises a ValueError of a worker process with its original message.

    PyTorch re-raises exceptions of workers with the traceback in front of the message. Here the message is only
    what the worker raised (the sample or file, and what to do); the traceback is in ``error.__cause__``.
    """

    def __iter__(self) -> Iterator[T]:  # type: ignore[override]
        try:
            yield from super().__iter__()
        except ValueError as error:
            if self.num_workers == 0:
                raise
            # A traceback ends with "NAME: message"; of chained exceptions, the last one is the one that was raised.
            message = re.split(rf"^(?:\w+\.)*{type(error).__name__}: ", str(error), flags=re.MULTILINE)[-1]
            raise type(error)(message.rstrip("\n")) from error


def make_processor(frontend: VlmFrontend, config: DataConfig) -> Processor:
    """The processor of a VLM for a data configuration."""
    return Processor(frontend.tokenizer, frontend.family, frontend.vision, frontend.geometry, config, frontend.cache)


def make_position_ids(frontend: VlmFrontend, config: DataConfig) -> PositionIds:
    """Multimodal position ids of padded sequences by the VLM family's rule, on the CPU; picklable."""
    seconds = frontend.vision.temporal_patch_size / config.video_fps
    return functools.partial(frontend.family.position_ids, frontend.meta, seconds_per_grid=seconds)


def visual_kind(config: DataConfig) -> str:
    """`"image"` or `"video"`, as the VLM calls them."""
    return {"images": "image", "video": "video"}[config.visual]


def grouping(config: DataConfig) -> Grouping | None:
    """Which samples of a micro-batch share frames in one sequence; None where each has a sequence of its own."""
    if config.questions_per_scene > 1:
        return groups_by_frames
    return separate_groups if config.packing else None


def make_collate(frontend: VlmFrontend, config: DataConfig, with_prompts: bool) -> Collator:
    """Collation of training samples."""
    return Collator(
        pad_id=frontend.tokenizer.pad_token_id,
        kind=visual_kind(config),
        position_ids=make_position_ids(frontend, config),
        vision=frontend.vision,
        geometry=frontend.geometry,
        family=frontend.family,
        with_prompts=with_prompts,
        grouping=grouping(config),
    )


def keep_working(worker: int) -> None:
    """Let a loader process work on when the signals that stop a run reach it too; `worker_init_fn` of every loader.

    A worker must first deliver what the run finishes its step with. PyTorch ends workers by SIGTERM: that of the
    parent is obeyed, which takes a thread, since only waiting for a signal tells who sent it.
    """
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    rank = multiprocessing.parent_process()  # not getppid: that may be Python's fork server
    assert rank is not None, "a loader process has a parent"
    threading.Thread(target=_obey_parent, args=(rank.pid,), daemon=True).start()


def _obey_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def train_loader(
    samples: Sequence[Sample],
    frontend: VlmFrontend,
    config: DataConfig,
    sampler: GlobalBatchSampler,
    with_prompts: bool = False,
) -> ReraisingDataLoader[Batch]:
    """Micro-batches of this rank, in the sampler's order; `with_prompts` where answers are decoded in training."""
    return ReraisingDataLoader(
        SampleDataset(samples, make_processor(frontend, config), with_answer=True),
        batch_sampler=sampler,
        collate_fn=make_collate(frontend, config, with_prompts),
        num_workers=config.workers,
        worker_init_fn=keep_working,
        prefetch_factor=config.prefetch if config.workers else None,
        pin_memory=torch.cuda.is_available(),  # then `Batch.to` copies without waiting
        persistent_workers=config.workers > 0,
        # Its own: else making the iterator draws from the random state that a resume has just put back.
        generator=torch.Generator(),
    )


def measure_loader(
    samples: Sequence[Sample], frontend: VlmFrontend, config: DataConfig, batch_size: int
) -> ReraisingDataLoader[Batch]:
    """Batches in order, with answers and with prompts, to compare the two readings of the shortcut's answer."""
    return ReraisingDataLoader(
        SampleDataset(samples, make_processor(frontend, config), with_answer=True),
        batch_size=batch_size,
        collate_fn=make_collate(frontend, config, with_prompts=True),
        generator=torch.Generator(),
    )


def prompt_loader(
    samples: Sequence[Sample],
    frontend: VlmFrontend,
    config: DataConfig,
    batch_size: int,
    processor: Callable[[Sample, bool], Features] | None = None,
) -> ReraisingDataLoader[Batch]:
    """Left-padded prompts in order, for generation; `processor` where it is not the VLM's own."""
    dataset = SampleDataset(samples, processor or make_processor(frontend, config), with_answer=False)
    collate = Collator(
        pad_id=frontend.tokenizer.pad_token_id,
        kind=visual_kind(config),
        position_ids=None,
        vision=frontend.vision,
        geometry=frontend.geometry,
        family=frontend.family,
    )
    return ReraisingDataLoader(
        dataset,
        batch_size=batch_size,
        collate_fn=collate,
        num_workers=config.workers,
        worker_init_fn=keep_working,
        # Its own: a validation must not draw from the random state that training goes on with.
        generator=torch.Generator(),
    )
