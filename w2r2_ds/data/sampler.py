"""Global batches that are the same for every world size and accumulation split."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from w2r2_ds.data.bins import in_bins
from w2r2_ds.data.mixture import Mixture


class GlobalBatchSampler(Sampler[list[int]]):
    """Yield this rank's micro-batches of sample indices, from optimizer step `start` to `steps`.

    Sample position `step * global_batch + j` walks through one order per epoch, so the data position after a resume
    follows from the step alone. That order brings questions about the same frames together, in bins that begin at
    multiples of `questions_per_scene`, across epochs too: a micro-batch is made of whole bins (data/bins.py).

    Args:
        mixture: the samples, and what an epoch shows of them.
        global_batch: samples per optimizer step; a multiple of `micro_batch * world_size`.
        micro_batch: samples per forward per rank.
        rank: this process.
        world_size: number of processes.
        steps: last optimizer step, exclusive.
        start: first optimizer step.
        seed: of the orders.
        questions_per_scene: samples per bin; `micro_batch` is a multiple. 1 leaves the order of the mixture.
    """

    def __init__(
        self,
        mixture: Mixture,
        global_batch: int,
        micro_batch: int,
        rank: int,
        world_size: int,
        steps: int,
        start: int = 0,
        seed: int = 0,
        questions_per_scene: int = 1,
    ) -> None:
        if mixture.epoch_size == 0:
            raise ValueError("An epoch has no samples; raise the weights in data.train, or see its manifest.json.")
        assert micro_batch % questions_per_scene == 0, "checked with the configuration"
        assert global_batch % (micro_batch * world_size) == 0, "checked against the DeepSpeed configuration before"
        self.mixture, self.global_batch, self.micro_batch = mixture, global_batch, micro_batch
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self.start, self.steps, self.together = start, steps, questions_per_scene
        self.frame_sets = mixture.frame_sets() if self.together > 1 else None

    def __len__(self) -> int:
        return (self.steps - self.start) * self.global_batch // (self.micro_batch * self.world_size)

    def __iter__(self) -> Iterator[list[int]]:
        epoch, order = -1, np.empty(0, dtype=np.int64)
        size = self.mixture.epoch_size
        stride = self.micro_batch * self.world_size
        for step in range(self.start, self.steps):
            for first in range(0, self.global_batch, stride):
                begin = step * self.global_batch + first + self.rank * self.micro_batch
                indices = []
                for position in range(begin, begin + self.micro_batch):
                    if position // size != epoch:
                        epoch = position // size
                        order = self.order(epoch)
                    indices.append(int(order[position % size]))
                yield indices

    def order(self, epoch: int) -> np.ndarray:
        """Indices of one epoch, ``[epoch_size]`` int64, the same on every rank."""
        order = self.mixture.epoch(self.seed, epoch)
        if self.frame_sets is None:
            return order
        first = -epoch * len(order) % self.together  # what completes the last bin of the epoch before
        generator = np.random.default_rng([self.seed, epoch, self.together])
        return in_bins(order, self.frame_sets[order], self.together, first, generator)
