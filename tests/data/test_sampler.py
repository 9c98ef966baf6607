"""Global batches do not depend on how they are split, and a resumed run continues them."""

from __future__ import annotations

import pytest

from w2r2_ds.data.mixture import Mixture
from w2r2_ds.data.sampler import GlobalBatchSampler

SIZE, GLOBAL = 13, 8


def plain(size: int) -> Mixture:
    """A mixture of one data set with every sample once per epoch; the sampler does not read samples."""
    return Mixture([range(size)], [1.0], [0])  # type: ignore[list-item]


def global_batches(world: int, accumulation: int, steps: int, start: int = 0, seed: int = 5) -> list[list[int]]:
    """Samples of every optimizer step, over all ranks."""
    micro = GLOBAL // world // accumulation
    result: list[list[int]] = [[] for _ in range(start, steps)]
    samplers = [
        GlobalBatchSampler(plain(SIZE), GLOBAL, micro, rank, world, steps, start, seed) for rank in range(world)
    ]
    per_rank = [list(sampler) for sampler in samplers]
    for sampler, batches in zip(samplers, per_rank, strict=True):
        assert len(batches) == len(sampler) == (steps - start) * accumulation
        assert all(len(batch) == micro for batch in batches)
    for number in range(len(per_rank[0])):
        for batches in per_rank:
            result[number // accumulation] += batches[number]
    return result


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_the_same_global_batches_for_every_split(world: int, accumulation: int) -> None:
    assert global_batches(world, accumulation, 9) == global_batches(1, 1, 9)


def test_each_epoch_has_every_sample_once_in_another_order() -> None:
    stream = [index for batch in global_batches(2, 2, SIZE) for index in batch]
    epochs = [stream[first : first + SIZE] for first in range(0, len(stream), SIZE)]
    assert len(epochs) == GLOBAL and all(sorted(epoch) == list(range(SIZE)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == GLOBAL


@pytest.mark.parametrize("start", [1, 4, 9])
def test_a_resumed_run_continues_exactly_even_with_another_split(start: int) -> None:
    assert global_batches(2, 2, 9, start) == global_batches(1, 1, 9)[start:]


def test_seeds_differ_and_repeat() -> None:
    assert global_batches(1, 1, 3, seed=1) != global_batches(1, 1, 3, seed=2)
    sampler = GlobalBatchSampler(plain(SIZE), GLOBAL, 4, 0, 2, 3)
    assert list(sampler) == list(sampler)


def test_fewer_samples_than_a_batch() -> None:
    batches = list(GlobalBatchSampler(plain(3), GLOBAL, GLOBAL, 0, 1, 3))
    assert sorted(index for batch in batches for index in batch) == sorted(list(range(3)) * 8)


def test_no_samples_raise() -> None:
    with pytest.raises(ValueError, match="no samples"):
        GlobalBatchSampler(plain(0), GLOBAL, 1, 0, 1, 3)
