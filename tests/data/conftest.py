"""Fixtures of the data tests: the hand-made scene, and one small synthetic data set for all of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hand_scene import write_scene
from w2r2_ds.demo.synthetic.rooms import Room, make_room
from w2r2_ds.demo.synthetic.write import Written, write_dataset


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Data root with one hand-made scene and a table of labels."""
    write_scene(tmp_path)
    header = "id\traw_category\tcategory\tcount\tnyu40id\teigen13id\tnyuClass\tnyu40class"
    rows = ["chair\tchair", "office chair\tchair", "table\ttable", "refrigerator\trefridgerator", "lamp\tlamp"]
    lines = [f"{i}\t{row.split(chr(9))[0]}\tx\t1\t5\t1\tx\t{row.split(chr(9))[1]}" for i, row in enumerate(rows)]
    (tmp_path / "scannetv2-labels.combined.tsv").write_text("\n".join([header, *lines]) + "\n")
    return tmp_path


@pytest.fixture(scope="session")
def rooms(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """Two training rooms and one validation room, small images."""
    return write_dataset(tmp_path_factory.mktemp("rooms") / "data", 7, 2, 1, (160, 120), 12)


@pytest.fixture(scope="session")
def many_rooms() -> list[Room]:
    """Thirty furnished rooms without images, about 650 objects."""
    return [make_room(np.random.default_rng([seed, 11]), 8) for seed in range(30)]
