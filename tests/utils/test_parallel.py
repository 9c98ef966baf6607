"""Threads per rank."""

from __future__ import annotations

import pytest

from w2r2_ds.utils.distributed import RankInfo
from w2r2_ds.utils.parallel import set_num_threads


def test_threads_are_shared_unless_the_user_set_them(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[int] = []
    monkeypatch.setattr("torch.set_num_threads", given.append)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    set_num_threads(RankInfo(), 2048, {})
    set_num_threads(RankInfo(1, 3, 1, 3), 2048, {})
    set_num_threads(RankInfo(1, 16, 1, 16), 2048, {})
    set_num_threads(RankInfo(), 64, {})
    set_num_threads(RankInfo(), 2048, {"OMP_NUM_THREADS": "5"})
    assert given == [8, 2, 1, 1]
