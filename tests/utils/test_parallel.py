"""Worker processes import plug-ins; threads per rank."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from w2r2_ds.utils import plugins
from w2r2_ds.utils.distributed import RankInfo
from w2r2_ds.utils.parallel import run_all, set_num_threads, threads_per_worker


def test_worker_processes_import_the_plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are not forked, so they must import plug-ins to have their registrations."""
    monkeypatch.setattr(plugins, "IMPORTED", [])
    (tmp_path / "settings.py").write_text("import os\nos.environ['A_TEST_PLUGIN'] = 'imported'\n")
    monkeypatch.setenv("A_TEST_PLUGIN", "")
    plugins.import_plugin(str(tmp_path / "settings.py"))
    monkeypatch.delenv("A_TEST_PLUGIN")
    assert list(run_all(os.getenv, [("A_TEST_PLUGIN",)] * 2, workers=2)) == ["imported"] * 2


def test_cores_are_divided_unless_omp_num_threads_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[int] = []
    monkeypatch.setattr("torch.set_num_threads", given.append)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    set_num_threads(RankInfo(), 2048, {})
    set_num_threads(RankInfo(1, 3, 1, 3), 2048, {})
    set_num_threads(RankInfo(1, 16, 1, 16), 2048, {})
    set_num_threads(RankInfo(), 64, {})
    set_num_threads(RankInfo(), 2048, {"OMP_NUM_THREADS": "5"})
    assert given == [8, 2, 1, 1]


def test_cores_are_divided_among_ranks_and_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)))
    assert threads_per_worker(0, RankInfo()) == threads_per_worker(1, RankInfo()) == 16
    assert threads_per_worker(4, RankInfo()) == 4
    assert threads_per_worker(3, RankInfo(1, 8, 1, 2)) == 2
    assert threads_per_worker(4, RankInfo(9, 16, 1, 8)) == 1  # not fewer than one
