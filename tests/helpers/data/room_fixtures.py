"""Fixtures: synthetic rooms, on disk as a small data set and in memory."""

from __future__ import annotations

import numpy as np
import pytest

from w2r2_ds.demo.synthetic.rooms import Room, make_room
from w2r2_ds.demo.synthetic.write import Written, write_dataset


@pytest.fixture(scope="session")
def rooms(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """A data set of two training rooms and one validation room with small images."""
    return write_dataset(tmp_path_factory.mktemp("rooms") / "data", 7, 2, 1, (160, 120), 12)


@pytest.fixture(scope="session")
def many_rooms() -> list[Room]:
    """Thirty furnished rooms without images, about 650 objects."""
    return [make_room(np.random.default_rng([seed, 11]), 8) for seed in range(30)]
