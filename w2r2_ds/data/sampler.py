"""Global batches that are the same for every world size and accumulation split."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from w2r2_ds.data.mixture import Mixture


class GlobalBatchSampler(Sampler[list[int]]):
    """Yield this rank's micro-batches of sample indices, from optimizer step `start` to `steps`.

    Sample position `step * global_batch + j` walks through one order per epoch, so the data position after a resume
    follows from the step alone. Samples of the same frames are adjacent in that order, in scene groups that begin at
    multiples of `questions_per_scene`, across epochs too, so that a micro-batch consists of whole groups.

    Args:
        mixture: the samples, and what an epoch shows of them.
        global_batch: samples per optimizer step; a multiple of `micro_batch * world_size`.
        micro_batch: samples per forward per rank.
        rank: this process.
        world_size: number of processes.
        steps: last optimizer step, exclusive.
        start: first optimizer step.
        seed: of the orders.
        questions_per_scene: samples per scene group; `micro_batch` is a multiple. 1 keeps the order of the mixture.
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
        self.start, self.steps, self.group_size = start, steps, questions_per_scene
        self.frame_sets = mixture.frame_sets() if self.group_size > 1 else None

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
        first = -epoch * len(order) % self.group_size  # completes the last group of the previous epoch
        generator = np.random.default_rng([self.seed, epoch, self.group_size])
        return group_by_frames(order, self.frame_sets[order], self.group_size, first, generator)


def group_by_frames(
    order: np.ndarray, sets: np.ndarray, size: int, first: int, generator: np.random.Generator
) -> np.ndarray:
    """Permute samples so that those with the same frames are adjacent, in scene groups of `size`.

    The first group has `first` samples (it completes the last group of the previous epoch); the last may be short.
    Each frame set fills as many whole groups as it can. Its remainder, fewer than `size` samples, shares a group with
    remainders of other frame sets, unsplit where it fits. Whole and shared groups come in random order.

    Args:
        order: ``[samples]`` int64, an epoch in random order.
        sets: ``[samples]`` int64, equal for samples with the same frames.
        size: samples per group.
        first: in [0, size), samples of the first group.
        generator: source of randomness.

    Returns:
        ``[samples]`` int64, a permutation of `order`.
    """
    # 1. Cut each frame set into whole groups and a remainder. The remainders' order decides which of them combine.
    full, rests = _chunks(sets, size)
    rests = [rests[i] for i in generator.permutation(len(rests))]
    first = min(first, len(order))
    last = (len(order) - first) % size
    # 2. The short groups at both ends are made of remainders; break up one whole group if those do not suffice.
    if sum(map(len, rests)) < first + last:
        rests.append(full.pop(int(generator.integers(len(full)))))
    # 3. Pack the remainders into the short groups and the groups that no frame set fills alone.
    middle = (len(order) - first - last) // size - len(full)
    begin, *combined, end = _fill(rests, [first, *[size] * middle, last])
    groups = [*full, *combined]
    chosen = [begin, *(groups[i] for i in generator.permutation(len(groups))), end]
    return order[np.concatenate([np.asarray(each, dtype=np.int64) for each in chosen])]


def _chunks(sets: np.ndarray, size: int) -> tuple[list[list[int]], list[list[int]]]:
    """Positions of equal sets: whole groups of `size`, and the non-empty remainder of each set."""
    full: list[list[int]] = []
    rests: list[list[int]] = []
    by_set = np.argsort(sets, kind="stable")
    for group in np.split(by_set, np.flatnonzero(np.diff(sets[by_set])) + 1):
        for begin in range(0, len(group), size):
            chunk = group[begin : begin + size].tolist()
            (full if len(chunk) == size else rests).append(chunk)
    return full, [rest for rest in rests if rest]


def _fill(pieces: list[list[int]], room: list[int]) -> list[list[int]]:
    """Best-fit decreasing bin packing of all pieces into groups of the given capacities; split a piece if none fits."""
    assert sum(map(len, pieces)) == sum(room), "the groups hold exactly the pieces"
    groups: list[list[int]] = [[] for _ in room]
    by_room: list[list[int]] = [[] for _ in range(max(room) + 1)]
    for number, space in enumerate(room):
        by_room[space].append(number)
    for piece in _longest_first(pieces, max(map(len, pieces), default=0)):
        fitting = [space for space in range(len(piece), len(by_room)) if by_room[space]]
        space = fitting[0] if fitting else max(space for space in range(len(by_room)) if by_room[space])
        number = by_room[space].pop()
        taken = piece[:space]
        groups[number] += taken
        by_room[space - len(taken)].append(number)
        del piece[: len(taken)]
    return groups


def _longest_first(pieces: list[list[int]], longest: int) -> Iterator[list[int]]:
    """Every piece, longest first; a piece that the caller shortens is yielded again at its new length."""
    by_length: list[list[list[int]]] = [[] for _ in range(longest + 1)]
    for piece in pieces:
        by_length[len(piece)].append(piece)
    for length in range(longest, 0, -1):
        while by_length[length]:
            piece = by_length[length].pop()
            yield piece
            if piece:
                by_length[len(piece)].append(piece)
