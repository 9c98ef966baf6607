"""Fixture: a real Slurm on this machine, started once for the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from slurm_cluster import Cluster, missing, running


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three nodes: two for a job and a spare."""
    if reason := missing():
        pytest.skip(reason)
    base = tmp_path_factory.mktemp("cluster")
    with running(base / "slurm", base / "repository", nodes=3) as started:
        yield started
