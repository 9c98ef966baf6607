"""Global batches that are the same for every world size and accumulation split."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from w2r2_ds.data.mixture import Mixture


class GlobalBatchSampler(Sampler[list[int]]):
    """Yield this rank's micro-batches of sample indices, from optimizer step `start` to `steps`.

    Sample position `step * global_batch + j` walks through one order per epoch, so the data position after a resume
    follows from the step alone. That order brings questions about the same frames together, in bins that begin at
    multiples of `questions_per_scene`, across epochs too: a micro-batch is made of whole bins (data/sampler.py).

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


def in_bins(order: np.ndarray, sets: np.ndarray, size: int, first: int, generator: np.random.Generator) -> np.ndarray:
    """The same samples, those that see the same frames together as far as it goes.

    The order is cut into bins of `size`, after a first one of `first` samples (the end of a bin that the epoch before
    began); the last may be short as well. Samples of a set of frames make as many full bins as they can. What is left
    of them, fewer than `size`, is put together with what is left of others, whole where it fits. Full bins and
    combined ones come in random order.

    Args:
        order: ``[samples]`` int64, an epoch in random order.
        sets: ``[samples]`` int64, equal where two of them see the same frames.
        size: samples per bin.
        first: in [0, size), samples of the first bin.
        generator: of all that is random here.

    Returns:
        ``[samples]`` int64, a permutation of `order`.
    """
    full, rests = _chunks(sets, size)
    rests = [rests[i] for i in generator.permutation(len(rests))]
    first = min(first, len(order))
    last = (len(order) - first) % size
    if sum(map(len, rests)) < first + last:  # too few to fill the short bins
        rests.append(full.pop(int(generator.integers(len(full)))))
    middle = (len(order) - first - last) // size - len(full)
    begin, *combined, end = _fill(rests, [first, *[size] * middle, last])
    bins = [*full, *combined]
    chosen = [begin, *(bins[i] for i in generator.permutation(len(bins))), end]
    return order[np.concatenate([np.asarray(each, dtype=np.int64) for each in chosen])]


def _chunks(sets: np.ndarray, size: int) -> tuple[list[list[int]], list[list[int]]]:
    """Positions of equal sets: groups of `size`, and what is left of each, not empty."""
    full: list[list[int]] = []
    rests: list[list[int]] = []
    by_set = np.argsort(sets, kind="stable")
    for group in np.split(by_set, np.flatnonzero(np.diff(sets[by_set])) + 1):
        for begin in range(0, len(group), size):
            chunk = group[begin : begin + size].tolist()
            (full if len(chunk) == size else rests).append(chunk)
    return full, [rest for rest in rests if rest]


def _fill(pieces: list[list[int]], room: list[int]) -> list[list[int]]:
    """Put all pieces into bins that have just as much room: the largest first, where it fits best, split at worst."""
    assert sum(map(len, pieces)) == sum(room), "the bins hold just the pieces"
    bins: list[list[int]] = [[] for _ in room]
    by_room: list[list[int]] = [[] for _ in range(max(room) + 1)]
    for number, space in enumerate(room):
        by_room[space].append(number)
    for piece in _longest_first(pieces, max(map(len, pieces), default=0)):
        fitting = [space for space in range(len(piece), len(by_room)) if by_room[space]]
        space = fitting[0] if fitting else max(space for space in range(len(by_room)) if by_room[space])
        number = by_room[space].pop()
        taken = piece[:space]
        bins[number] += taken
        by_room[space - len(taken)].append(number)
        del piece[: len(taken)]
    return bins


def _longest_first(pieces: list[list[int]], longest: int) -> Iterator[list[int]]:
    """Every piece, the longest first; what the caller leaves of one comes again, in its place."""
    by_length: list[list[list[int]]] = [[] for _ in range(longest + 1)]
    for piece in pieces:
        by_length[len(piece)].append(piece)
    for length in range(longest, 0, -1):
        while by_length[length]:
            piece = by_length[length].pop()
            yield piece
            if piece:
                by_length[len(piece)].append(piece)
