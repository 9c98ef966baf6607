"""`Mixture`: concatenation of prepared data sets with weights and caps, and the order of an epoch."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import numpy as np

from w2r2_ds.types.sample import Sample


class Mixture(Sequence[Sample]):
    """Concatenation of data sets; an epoch draws a number of samples from each set.

    Indices and iteration refer to the concatenation, where every sample occurs once; `epoch` applies weights and caps.

    Args:
        sets: data sets.
        weights: per set, how often an epoch contains each of its samples. 1.5: all samples once, and a random half of
            them a second time.
        caps: per set, the maximum number of its samples in an epoch; 0 for no limit.
    """

    def __init__(self, sets: Sequence[Sequence[Sample]], weights: Sequence[float], caps: Sequence[int]) -> None:
        assert len(sets) == len(weights) == len(caps), "one weight and one cap per set"
        self.sets, self.weights, self.caps = list(sets), list(weights), list(caps)
        self._ends = list(accumulate(map(len, self.sets)))  # index after the last sample of each set

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        which = bisect_right(self._ends, index)
        samples = self.sets[which]
        return samples[index - (self._ends[which] - len(samples))]

    def __iter__(self) -> Iterator[Sample]:
        return chain.from_iterable(self.sets)

    @property
    def samples_per_set(self) -> list[int]:
        """Number of samples of each set in an epoch."""
        counts = [round(weight * len(samples)) for weight, samples in zip(self.weights, self.sets, strict=True)]
        return [min(count, cap) if cap else count for count, cap in zip(counts, self.caps, strict=True)]

    @property
    def epoch_size(self) -> int:
        """Number of samples in an epoch."""
        return sum(self.samples_per_set)

    def frame_sets(self) -> np.ndarray:
        """Number of the frame set of every sample, ``[len(self)]`` int64.

        Two samples have the same number if they have the same frame files in the same order.
        """
        numbers: dict[tuple[Path, ...], int] = {}
        return np.array([numbers.setdefault(sample.frames, len(numbers)) for sample in self], dtype=np.int64)

    def epoch(self, seed: int, epoch: int) -> np.ndarray:
        """Sample indices of one epoch in random order.

        The order is a function of `seed` and `epoch`, so it is the same on all ranks and in a resumed run.

        Args:
            seed: random seed of the run.
            epoch: number of the epoch, from 0.

        Returns:
            ``[epoch_size]`` int64.
        """
        generator = np.random.default_rng([seed, epoch])
        drawn = []
        for count, samples, end in zip(self.samples_per_set, self.sets, self._ends, strict=True):
            size = len(samples)
            # All samples as often as they fit into `count`, then a random part of them.
            whole = np.tile(np.arange(size), count // size) if size else np.empty(0, dtype=np.int64)
            rest = count - len(whole)
            part = generator.permutation(size)[:rest] if rest else np.empty(0, dtype=np.int64)
            # from indices into the set to indices into the concatenation
            drawn.append(np.concatenate([whole, part]).astype(np.int64) + end - size)
        indices = np.concatenate(drawn) if drawn else np.empty(0, dtype=np.int64)
        return indices[generator.permutation(len(indices))]
