"""Batch sampler whose global batches are the same for every world size and every accumulation."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from w2r2_ds.data.mixture import Mixture


class GlobalBatchSampler(Sampler[list[int]]):
    """Yields this rank's micro-batches of sample indices, from optimizer step `start` to `steps`.

    All samples of a run form one endless list: epoch 0 in its order, then epoch 1, and so on. Step ``s`` has the list's
    positions ``s * global_batch`` to ``(s + 1) * global_batch``. The list follows from `seed` and the mixture only;
    there is no state to save. So a run that resumes at step ``s`` continues with exactly the samples that it would have
    had, also on another number of ranks or with another `micro_batch`.

    With `questions_per_scene` K > 1, samples with the same frames are adjacent in the list, in scene groups of K that
    begin at multiples of K, also where an epoch ends. So every micro-batch consists of whole groups.

    Args:
        mixture: the samples, and the size and order of an epoch.
        global_batch: samples per optimizer step; a multiple of ``micro_batch * world_size``.
        micro_batch: samples per forward pass and rank.
        rank: this process.
        world_size: number of processes.
        steps: last optimizer step, exclusive.
        start: first optimizer step.
        seed: seed of the epochs' orders.
        questions_per_scene: samples per scene group; `micro_batch` is a multiple of it. 1 keeps the mixture's order.

    Raises:
        ValueError: an epoch has no samples.
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
            for first in range(0, self.global_batch, stride):  # one accumulation step of all ranks
                begin = step * self.global_batch + first + self.rank * self.micro_batch
                indices = []
                for position in range(begin, begin + self.micro_batch):
                    if position // size != epoch:
                        epoch = position // size
                        order = self.order(epoch)
                    indices.append(int(order[position % size]))
                yield indices

    def order(self, epoch: int) -> np.ndarray:
        """Sample indices of one epoch, ``[epoch_size]`` int64, the same on every rank."""
        order = self.mixture.epoch(self.seed, epoch)
        if self.frame_sets is None:
            return order
        # The epoch begins at position epoch * len(order), which may be inside of a group: complete that group first.
        first = -epoch * len(order) % self.group_size
        generator = np.random.default_rng([self.seed, epoch, self.group_size])
        return group_by_frames(order, self.frame_sets[order], self.group_size, first, generator)


def group_by_frames(
    order: np.ndarray, sets: np.ndarray, size: int, first: int, generator: np.random.Generator
) -> np.ndarray:
    """Permute samples so that those with the same frames are adjacent, in scene groups of `size`.

    The first group has `first` samples (it completes the last group of the previous epoch); the last one may be short.
    Each frame set fills as many whole groups as it can. Its remainder, fewer than `size` samples, shares a group with
    remainders of other frame sets, unsplit if it fits. Whole and shared groups are in random order.

    Args:
        order: ``[samples]`` int64, sample indices of an epoch in random order.
        sets: ``[samples]`` int64, frame set of every entry of `order`.
        size: samples per group.
        first: in [0, size), samples of the first group.
        generator: random generator of the epoch.

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
    # 3. Pack the remainders into the short groups and the groups that no single frame set fills.
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
