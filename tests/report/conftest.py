"""Fixtures: rooms on disk with a prepared grounding set, and runs whose answers are made from its labels."""

from __future__ import annotations

from pathlib import Path

import pytest

from report_runs import prepare_rooms, write_hostile_run, write_run
from w2r2_ds.demo.synthetic.write import write_dataset
from w2r2_ds.types.sample import Sample


@pytest.fixture(scope="session")
def report_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data root with two small rooms for each split."""
    root = tmp_path_factory.mktemp("report") / "scenes"
    write_dataset(root, 7, 1, 2, (112, 84), 6)
    return root


@pytest.fixture(scope="session")
def room_samples(report_root: Path) -> list[Sample]:
    """Samples of the prepared grounding set."""
    return prepare_rooms(report_root)


@pytest.fixture(scope="session")
def finished_run(report_root: Path, room_samples: list[Sample], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with metrics and two evaluations."""
    return write_run(tmp_path_factory.mktemp("finished") / "margin", report_root, room_samples)


@pytest.fixture(scope="session")
def hostile_run(report_root: Path, room_samples: list[Sample], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with markup in every text."""
    return write_hostile_run(tmp_path_factory.mktemp("hostile"), report_root, room_samples)
