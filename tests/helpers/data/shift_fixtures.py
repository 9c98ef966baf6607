"""Fixtures: small data sets with shifted validation splits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from w2r2_ds.data.sources.scannet import Scene, load_scene
from w2r2_ds.data.sources.shortcut_cues import ShortcutCue, cues_file, read_cues
from w2r2_ds.demo.synthetic.options import Options, ShiftOptions
from w2r2_ds.demo.synthetic.write import Written, write_dataset

SHIFTED = Options(3, 1, 2, (96, 72), 8, 1.0, ShiftOptions(("furniture_scale", "focal_length", "room_scale", "camera")))
"""Options of the fixture `shifted`."""
PLANTED = Options(5, 1, 2, (64, 48), 8, 1.0, ShiftOptions(("position_prior",)))
"""Options of the fixture `planted`."""


def write(root: Path, options: Options, workers: int = 1) -> Written:
    return write_dataset(root, **{**vars(options), "workers": workers})


@pytest.fixture(scope="session")
def shifted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set with four shifts of two validation rooms."""
    return write(tmp_path_factory.mktemp("shifted") / "data", SHIFTED).root


@pytest.fixture(scope="session")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set with a position prior."""
    return write(tmp_path_factory.mktemp("planted") / "data", PLANTED).root


def read_file(root: Path, pattern: str, split: str) -> Any:
    """Content of the annotation file of a split."""
    return json.loads((root / pattern.format(split)).read_text())


def cues_of(root: Path, shift: str) -> list[ShortcutCue]:
    return list(read_cues(cues_file(root, f"val_{shift}")).values())


def scene_pairs(root: Path, cues: list[ShortcutCue]) -> dict[str, tuple[Scene, Scene]]:
    """Shifted scene's name -> the scene of ``val`` and the shifted scene."""
    names = {cue.scene_id: cue.paired_id.partition("|")[0] for cue in cues}
    return {name: (load_scene(root, paired), load_scene(root, name)) for name, paired in names.items()}


def frame_poses(scene: Scene) -> dict[int, np.ndarray]:
    return {frame.index: frame.cam_to_world for frame in scene.frames}
