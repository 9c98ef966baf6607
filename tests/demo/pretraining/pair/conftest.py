"""A written and prepared data set of two rooms with the demo's options, and the same rooms in memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from w2r2_ds.data.frames.selection import FrameOptions
from w2r2_ds.data.prepare.pipeline import prepare
from w2r2_ds.data.prepared_set import PreparedSet
from w2r2_ds.data.tasks.base import TaskOptions
from w2r2_ds.demo.assets import PAIRS, WEIGHTS
from w2r2_ds.demo.pretraining.pair.rooms.room_set import RoomSet, render_room, stack_rooms
from w2r2_ds.demo.pretraining.pair.rooms.tasks import DECIMALS
from w2r2_ds.demo.pretraining.pair.settings import IMAGE_SIZE, ROOM_FRAMES, SAMPLE_FRAMES
from w2r2_ds.demo.synthetic.options import scene_seed
from w2r2_ds.demo.synthetic.rooms import make_room
from w2r2_ds.demo.synthetic.write import write_dataset

SEED = 3


@dataclass(frozen=True)
class WrittenRooms:
    """Prepared sets by task, and the same rooms in memory."""

    sets: dict[str, PreparedSet]
    rooms: RoomSet


@pytest.fixture(scope="package")
def written(tmp_path_factory: pytest.TempPathFactory) -> WrittenRooms:
    """Two training rooms, as files and in memory."""
    root = tmp_path_factory.mktemp("rooms")
    write_dataset(
        root / "scenes",
        SEED,
        2,
        1,
        IMAGE_SIZE,
        ROOM_FRAMES,
        sentences="phrases",
        world_frame="corner",
        questions=("unique_color", "count"),
    )
    sets = {}
    for task in ("scanrefer", "scan2cap", "scanqa"):
        options = TaskOptions(
            task, "train", "video3dllm", FrameOptions("uniform", SAMPLE_FRAMES), visibility="depth", decimals=DECIMALS
        )
        folder = prepare(root / "scenes", options, root / "prepared" / task, quiet=True).folder
        sets[task] = PreparedSet(folder, root / "scenes")
    parts = []
    for index in range(2):
        rng = np.random.default_rng([*scene_seed(SEED, "train", index), 0])  # 0: the first attempt
        parts.append(render_room(make_room(rng, ROOM_FRAMES), rng))
    return WrittenRooms(sets, stack_rooms(parts))


@pytest.fixture(scope="session")
def shipped() -> Path:
    """Folder of the default pair that the package ships, on point maps."""
    return WEIGHTS / PAIRS["point_map"]
