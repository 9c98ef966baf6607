"""Scenes of the steps of the tiny VGGT's pretraining."""

from __future__ import annotations

from dataclasses import replace

from w2r2_ds.demo.pretraining.vggt.initialise import FIRST_ROOMS
from w2r2_ds.demo.pretraining.vggt.room_views import VIEWS
from w2r2_ds.demo.pretraining.vggt.scenes import SPREAD, VGGTSettings, draw_dense_frames, draw_scenes

SETTINGS = VGGTSettings(scenes=64)


def offsets(step: int) -> list[tuple[int, ...]]:
    """Views of each scene relative to its first, from -11 to 12."""
    half = VIEWS // 2
    return [
        tuple((view - scene.views[0] + half - 1) % VIEWS - half + 1 for view in scene.views)
        for scene in draw_scenes(SETTINGS, step)
    ]


def test_scenes_depend_on_seed_and_step_only() -> None:
    assert draw_scenes(SETTINGS, 7) == draw_scenes(SETTINGS, 7)
    assert draw_scenes(SETTINGS, 7) != draw_scenes(SETTINGS, 8)
    assert draw_scenes(SETTINGS, 7) != draw_scenes(replace(SETTINGS, seed=1), 7)


def test_half_of_the_scenes_are_spread_and_the_others_near_at_first() -> None:
    spread = [tuple((d * view + VIEWS // 2 - 1) % VIEWS - VIEWS // 2 + 1 for view in SPREAD) for d in (1, -1)]
    first = offsets(0)
    near = [scene for scene in first if scene not in spread]
    assert 20 < len(near) < 44
    assert max(abs(view) for scene in near for view in scene) == 2
    assert all(len(set(scene)) == len(SPREAD) for scene in near)
    last = [scene for scene in offsets(SETTINGS.steps - 1) if scene not in spread]
    assert max(abs(view) for scene in last for view in scene) == VIEWS // 2


def test_every_step_adds_a_room() -> None:
    assert {scene.room for scene in draw_scenes(SETTINGS, 0)} == set(range(FIRST_ROOMS))
    assert max(scene.room for scene in draw_scenes(SETTINGS, 100)) in range(2 * FIRST_ROOMS, FIRST_ROOMS + 100)
    assert max(scene.room for scene in draw_scenes(SETTINGS, SETTINGS.steps - 1)) < SETTINGS.rooms


def test_dense_frames_are_different_frames() -> None:
    drawn = {tuple(draw_dense_frames(SETTINGS, step)) for step in range(50)}
    assert drawn == {(i, j) for i in range(4) for j in range(i + 1, 4)}
