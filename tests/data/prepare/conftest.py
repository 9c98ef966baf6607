"""Fixtures: a data root with several scenes, and the same with damaged files."""

from __future__ import annotations

from pathlib import Path

import pytest

from hand_scene import SCENE, entry, write_annotations, write_scene
from preparations import SECOND, THIRD


@pytest.fixture
def scenes(root: Path) -> Path:
    """Three copies of the scene; their descriptions alternate, so that those of one scene are not consecutive."""
    for scene_id in (SECOND, THIRD):
        write_scene(root, scene_id)
    names = [SECOND, SCENE, THIRD, SCENE, SECOND, THIRD]
    entries = [{**entry(ann_id=n), "scene_id": name} for n, name in enumerate(names)]
    entries.append(entry(3, "lamp", 6, "a hidden lamp."))
    write_annotations(root, entries)
    return root


@pytest.fixture
def damaged(scenes: Path) -> Path:
    """A scene without images, and one with a malformed pose."""
    for path in (scenes / "posed_images" / SECOND).iterdir():
        path.unlink()
    (scenes / "posed_images" / THIRD / "00000.txt").write_text("1 0 0")
    return scenes
