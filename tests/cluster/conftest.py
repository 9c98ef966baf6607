"""Fixture: a real Slurm cluster on this machine, started once for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from slurm_cluster import Cluster, missing_requirement, running_cluster


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster of three nodes: jobs use two, the third replaces a lost one."""
    if reason := missing_requirement():
        pytest.skip(reason)
    base = tmp_path_factory.mktemp("cluster")
    with running_cluster(base / "slurm", base / "repository", nodes=3) as cluster:
        yield cluster
