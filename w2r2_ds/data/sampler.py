"""Batch sampler whose global batches do not depend on the world size or the number of accumulation steps."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from w2r2_ds.data.mixture import Mixture


class GlobalBatchSampler(Sampler[list[int]]):
    """Yield this rank's micro-batches of sample indices, for the optimizer steps from `start` to `steps` - 1.

    All samples of a run form one endless list: epoch 0 in its order, then epoch 1, and so on. Step ``s`` has the list's
    positions ``s * global_batch`` to ``(s + 1) * global_batch - 1``. The list is a function of `seed` and the mixture;
    there is no state to save. A run that resumes at step ``s`` therefore continues with the samples of an uninterrupted
    run, also on another number of ranks or with another `micro_batch`.

    With `questions_per_scene` K > 1, samples with the same frames are adjacent in the list, in scene groups of K that
    begin at multiples of K, also across the end of an epoch. So every micro-batch consists of whole groups.

    Args:
        mixture: the samples, and the size and order of an epoch.
        global_batch: samples per optimizer step; a multiple of ``micro_batch * world_size``.
        micro_batch: samples per forward pass and rank.
        rank: rank of this process.
        world_size: number of ranks.
        steps: optimizer steps of the run.
        start: first optimizer step; the completed steps of a resumed run.
        seed: random seed of the epochs' orders.
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
        assert micro_batch % questions_per_scene == 0, "guaranteed by config/schema.py"
        assert global_batch % (micro_batch * world_size) == 0, "guaranteed by training/deepspeed/config.py"
        self.mixture, self.global_batch, self.micro_batch = mixture, global_batch, micro_batch
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self.start, self.steps, self.group_size = start, steps, questions_per_scene
        self.frame_sets = mixture.frame_sets() if self.group_size > 1 else None

    def __len__(self) -> int:
        return (self.steps - self.start) * self.global_batch // (self.micro_batch * self.world_size)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.numbered():
            yield [index for _, index in batch]

    def numbered(self) -> Iterator[list[tuple[int, int]]]:
        """The same micro-batches, as pairs (number of the scene group in the endless list, sample index)."""
        epoch, order = -1, np.empty(0, dtype=np.int64)
        size = self.mixture.epoch_size
        stride = self.micro_batch * self.world_size
        for step in range(self.start, self.steps):
            for first in range(0, self.global_batch, stride):  # one accumulation step of all ranks
                # Consecutive positions of an accumulation step: micro-batch of rank 0, of rank 1, ...
                begin = step * self.global_batch + first + self.rank * self.micro_batch
                batch = []
                for position in range(begin, begin + self.micro_batch):
                    # A micro-batch may span two epochs, or several short ones.
                    if position // size != epoch:
                        epoch = position // size
                        order = self.order(epoch)
                    batch.append((position // self.group_size, int(order[position % size])))
                yield batch

    def order(self, epoch: int) -> np.ndarray:
        """Sample indices of one epoch in its order, ``[epoch_size]`` int64, the same on every rank."""
        order = self.mixture.epoch(self.seed, epoch)
        if self.frame_sets is None:
            return order
        # The epoch begins at position epoch * len(order) of the endless list. If that is not a multiple of group_size,
        # the epoch's first `first` samples complete the last group of the previous epoch.
        first = -epoch * len(order) % self.group_size
        generator = np.random.default_rng([self.seed, epoch, self.group_size])
        return group_by_frames(order, self.frame_sets[order], self.group_size, first, generator)


def group_by_frames(
    order: np.ndarray, sets: np.ndarray, size: int, first: int, generator: np.random.Generator
) -> np.ndarray:
    """Permute the samples of an epoch so that those with the same frames are adjacent, in scene groups of `size`.

    The first group has `first` samples (it completes the last group of the previous epoch); the last one may be short.
    Each frame set fills as many whole groups as it can. Its remainder, fewer than `size` samples, shares a group with
    remainders of other frame sets; it is split only if it fits into no group. Whole and shared groups are in random
    order.

    Args:
        order: ``[samples]`` int64, sample indices of an epoch in random order.
        sets: ``[samples]`` int64, frame set of every entry of `order`.
        size: samples per group.
        first: number of samples of the first group, in [0, size).
        generator: random generator of the epoch.

    Returns:
        ``[samples]`` int64, a permutation of `order`.
    """
    # 1. Cut each frame set into whole groups and a remainder. The remainders' order decides which of them combine.
    whole, remainders = _cut(sets, size)
    remainders = [remainders[i] for i in generator.permutation(len(remainders))]
    first = min(first, len(order))
    last = (len(order) - first) % size
    # 2. The short groups at both ends consist of remainders; break up one whole group if those do not suffice.
    if sum(map(len, remainders)) < first + last:
        remainders.append(whole.pop(int(generator.integers(len(whole)))))
    # 3. Pack the remainders into both short groups and into the groups that no single frame set fills.
    num_combined = (len(order) - first - last) // size - len(whole)
    begin, *combined, end = _pack(remainders, [first, *[size] * num_combined, last])
    groups = [*whole, *combined]
    chosen = [begin, *(groups[i] for i in generator.permutation(len(groups))), end]
    return order[np.concatenate([np.asarray(positions, dtype=np.int64) for positions in chosen])]


def _cut(sets: np.ndarray, size: int) -> tuple[list[list[int]], list[list[int]]]:
    """Positions of equal entries of `sets`: whole groups of `size`, and the non-empty remainder of each frame set."""
    whole: list[list[int]] = []
    remainders: list[list[int]] = []
    # A stable sort makes the positions of each set contiguous and keeps their random order; then split between sets.
    by_set = np.argsort(sets, kind="stable")
    for positions in np.split(by_set, np.flatnonzero(np.diff(sets[by_set])) + 1):
        for begin in range(0, len(positions), size):
            chunk = positions[begin : begin + size].tolist()
            (whole if len(chunk) == size else remainders).append(chunk)
    return whole, remainders


def _pack(pieces: list[list[int]], capacities: list[int]) -> list[list[int]]:
    """Best-fit decreasing bin packing of all pieces into groups; a piece that fits into none is split.

    Args:
        pieces: lists of positions; emptied.
        capacities: capacity of every group; the pieces fill all groups.

    Returns:
        The positions in every group.
    """
    assert sum(map(len, pieces)) == sum(capacities), "the pieces fill the groups"
    groups: list[list[int]] = [[] for _ in capacities]
    by_space: list[list[int]] = [[] for _ in range(max(capacities) + 1)]  # free space -> groups that have it
    for index, space in enumerate(capacities):
        by_space[space].append(index)
    for piece in _longest_first(pieces, max(map(len, pieces), default=0)):
        # Best fit: the least space that holds the piece. If none does, fill the group with the most space, and return
        # the rest of the piece to `_longest_first`.
        fitting = [space for space in range(len(piece), len(by_space)) if by_space[space]]
        space = fitting[0] if fitting else max(space for space in range(len(by_space)) if by_space[space])
        index = by_space[space].pop()
        taken = piece[:space]
        groups[index] += taken
        by_space[space - len(taken)].append(index)
        del piece[: len(taken)]
    return groups


def _longest_first(pieces: list[list[int]], longest: int) -> Iterator[list[int]]:
    """Yield every piece, longest first; a piece that the caller shortens is yielded again at its new length."""
    by_length: list[list[list[int]]] = [[] for _ in range(longest + 1)]
    for piece in pieces:
        by_length[len(piece)].append(piece)
    for length in range(longest, 0, -1):
        while by_length[length]:
            piece = by_length[length].pop()
            yield piece
            if piece:
                by_length[len(piece)].append(piece)
