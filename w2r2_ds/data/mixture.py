"""Several prepared data sets as one: weights, caps, and what an epoch shows."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import numpy as np

from w2r2_ds.types.sample import Sample


class Mixture(Sequence[Sample]):
    """The samples of several data sets, one after the other.

    Args:
        sets: data sets.
        weights: per set, how often an epoch shows each of its samples; of 1.5, all of them once and a random half a
            second time.
        caps: per set, the most samples an epoch shows of it; 0 for no limit.
    """

    def __init__(self, sets: Sequence[Sequence[Sample]], weights: Sequence[float], caps: Sequence[int]) -> None:
        assert len(sets) == len(weights) == len(caps), "one weight and one cap per set"
        self.sets, self.weights, self.caps = list(sets), list(weights), list(caps)
        self._ends = list(accumulate(len(each) for each in self.sets))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        which = bisect_right(self._ends, index)
        return self.sets[which][index - (self._ends[which] - len(self.sets[which]))]

    def __iter__(self) -> Iterator[Sample]:
        return chain.from_iterable(self.sets)

    @property
    def shares(self) -> list[int]:
        """Number of samples of each set in an epoch."""
        counts = [round(weight * len(each)) for weight, each in zip(self.weights, self.sets, strict=True)]
        return [min(count, cap) if cap else count for count, cap in zip(counts, self.caps, strict=True)]

    @property
    def epoch_size(self) -> int:
        """Samples in an epoch."""
        return sum(self.shares)

    def frame_sets(self) -> np.ndarray:
        """``[len(self)]`` int64, equal for samples, of any set, that see the same files in the same order."""
        numbers: dict[tuple[Path, ...], int] = {}
        return np.array([numbers.setdefault(sample.frames, len(numbers)) for sample in self], dtype=np.int64)

    def epoch(self, seed: int, epoch: int) -> np.ndarray:
        """Indices of one epoch in random order: ``[epoch_size]`` int64, the same on every rank.

        Args:
            seed: of the run.
            epoch: from 0.
        """
        generator = np.random.default_rng([seed, epoch])
        drawn = []
        for share, each, end in zip(self.shares, self.sets, self._ends, strict=True):
            whole = np.tile(np.arange(len(each)), share // len(each)) if len(each) else np.empty(0, dtype=np.int64)
            rest = share - len(whole)
            part = generator.permutation(len(each))[:rest] if rest else np.empty(0, dtype=np.int64)
            drawn.append(np.concatenate([whole, part]).astype(np.int64) + end - len(each))
        indices = np.concatenate(drawn) if drawn else np.empty(0, dtype=np.int64)
        return indices[generator.permutation(len(indices))]
