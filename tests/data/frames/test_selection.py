"""Frames that each sampling method selects."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hand_scene import SCENE
from w2r2_ds.data.frames.selection import (
    REDRAWS,
    FrameOptions,
    FrameSampling,
    assign_set,
    frames_from_file,
    scene_sets,
    select_frames,
    uniform,
    vgllm,
)
from w2r2_ds.data.sources.scannet import Scene, load_scene

TOTAL, COUNT = st.integers(1, 400), st.integers(1, 40)


@pytest.fixture
def scene(root: Path) -> Scene:
    """The hand-made scene with 101 copies of its first frame, numbered 0, 10, 20, ..."""
    scene = load_scene(root, SCENE)
    return replace(scene, frames=tuple(replace(scene.frames[0], index=10 * i) for i in range(101)))


class Starts:
    """Random generator that returns given numbers."""

    def __init__(self, *starts: int) -> None:
        self.left = list(starts)

    def integers(self, total: int) -> int:
        assert self.left[0] < total
        return self.left.pop(0)


def rotated(total: int, count: int, start: int) -> list[int]:
    """VG-LLM's rule as the paper states it: rotate the list, take every floor(T / N)-th, keep N."""
    images = list(range(total))
    images = images[start:] + images[:start]
    return images if total < count else images[:: total // count][:count]


@pytest.mark.parametrize(
    ("total", "count", "expected"),
    [(10, 4, [0, 3, 6, 9]), (11, 4, [0, 3, 6, 10]), (101, 5, [0, 25, 50, 75, 100]), (3, 8, [0, 1, 2]), (7, 1, [0])],
)
def test_uniform_by_hand(total: int, count: int, expected: list[int]) -> None:
    assert uniform(total, count) == expected  # 0, 3.3, 6.7, 10 are rounded down


@given(TOTAL, COUNT)
def test_uniform_frames_are_distinct(total: int, count: int) -> None:
    chosen = uniform(total, count)
    assert chosen == sorted(set(chosen)) and len(chosen) == min(total, count) and chosen[0] == 0
    assert count == 1 or chosen[-1] == total - 1


@given(TOTAL, COUNT, st.data())
def test_vgllm_draws_by_its_rule(total: int, count: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, total - 1))
    assert vgllm(total, count, Starts(start), None) == rotated(total, count, start)  # type: ignore[arg-type]


def test_vgllm_draws_again_until_a_frame_shows_the_object() -> None:
    def drawn(starts: list[int], seen: set[int]) -> tuple[list[int], int]:
        rng = Starts(*starts)
        return vgllm(100, 4, rng, frozenset(seen)), len(rng.left)  # type: ignore[arg-type]

    assert drawn([7, 8, 9], {58}) == ([8, 33, 58, 83], 1)  # stride 25; start 7 draws 7, 32, 57, 82
    assert drawn([90] * REDRAWS + [60, 1], {10}) == ([60, 85, 10, 35], 1)  # the twentieth redraw
    # never: of 90, 15, 40, 65 the last is replaced by the first frame that shows the object
    assert drawn([90] * (REDRAWS + 1) + [5], {99, 5}) == ([5, 15, 40, 90], 1)
    assert drawn([90] * (REDRAWS + 1), {70, 71}) == ([15, 40, 70, 90], 0)


@given(TOTAL, COUNT, st.integers(0, 2**32), st.data())
def test_vgllm_always_shows_the_object(total: int, count: int, seed: int, data: st.DataObject) -> None:
    seen = data.draw(st.frozensets(st.integers(0, total - 1), min_size=1, max_size=3))
    chosen = vgllm(total, count, np.random.default_rng(seed), seen)
    assert seen & set(chosen) and len(set(chosen)) == len(chosen) == min(total, count)


def test_a_draw_depends_on_seed_scene_and_key_only(scene: Scene) -> None:
    options = FrameOptions("vgllm", 4)
    # what another process and another version must draw too; every process salts Python's own hash() differently
    assert select_frames(options, scene, "chair|0|roll 0", None) == [50, 75, 100, 24]
    keys = [f"object {i}|roll {roll}" for i in range(20) for roll in range(2)]
    once = {key: select_frames(options, scene, key, None) for key in keys}
    assert {key: select_frames(options, scene, key, None) for key in reversed(keys)} == once
    assert sum(once[f"object {i}|roll 0"] != once[f"object {i}|roll 1"] for i in range(20)) >= 15
    other = replace(scene, scene_id="scene0001_00")
    assert sum(select_frames(options, other, key, None) != once[key] for key in keys) >= 35
    assert sum(select_frames(replace(options, seed=1), scene, key, None) != once[key] for key in keys) >= 35


def test_vgllm_starts_are_uniform_over_the_scene(scene: Scene) -> None:
    starts = [select_frames(FrameOptions("vgllm", 4), scene, str(i), None)[0] for i in range(1000)]  # type: ignore[index]
    assert len(set(starts)) == 101
    assert np.mean(starts) == pytest.approx(50, abs=4)  # four standard errors


@given(TOTAL, COUNT, st.integers(1, 6), st.integers(0, 2**32))
def test_scene_sets_are_evenly_strided_and_cover_the_scene(total: int, count: int, sets: int, seed: int) -> None:
    made = scene_sets(total, count, sets, seed, SCENE)
    size = min(total, count)
    assert len(made) == sets
    for positions in made:
        assert len(set(positions)) == len(positions) == size and min(positions) >= 0 and max(positions) < total
        # neighbours, also around the end of the scene, are one stride apart, rounded up or down
        gaps = {
            (after - before) % total or total
            for before, after in zip(positions, [*positions[1:], positions[0]], strict=True)
        }
        assert gaps <= {total // size, -(-total // size)}
    together = sorted(set().union(*map(set, made)))
    largest = max(np.diff([*together, together[0] + total]))
    assert largest <= -(-total // (size * sets))  # so every frame is in a set if there are no more than size * sets


def test_scene_sets_begin_in_different_parts_of_the_scene() -> None:
    for seed in range(20):
        starts = sorted(positions[0] for positions in scene_sets(400, 32, 4, seed, SCENE))
        # quarters of the scene: about 100 frames apart, off by less than one stride (12.5)
        assert all(80 < gap < 120 for gap in np.diff([*starts, starts[0] + 400]))
    together = [
        set().union(*scene_sets(400, 8, 4, seed, name)) for seed in range(5) for name in (SCENE, "scene0001_00")
    ]
    assert len(set(map(frozenset, together))) >= 7  # of ten draws from 25 patterns


def test_a_sample_gets_the_set_with_most_frames_of_its_object() -> None:
    sets = [[0, 4, 8], [1, 5, 9], [2, 6, 10], [3, 7, 11]]
    for key in map(str, range(20)):
        assert assign_set(sets, key, frozenset({0, 1, 5, 6})) == sets[1]
        assert assign_set(sets, key, frozenset({12})) is None


def test_samples_are_spread_over_equal_sets() -> None:
    sets = [[0, 4, 8], [1, 5, 9], [2, 6, 10], [3, 7, 11]]
    spread = Counter(tuple(assign_set(sets, str(i), frozenset({0, 2, 3, 7, 4, 12})) or ()) for i in range(1000))
    assert set(spread) == {(0, 4, 8), (3, 7, 11)}  # two frames of the object each
    assert max(spread.values()) < 565  # four standard deviations from half
    everything = Counter(tuple(assign_set(sets, str(i), None) or ()) for i in range(1000))
    assert len(everything) == 4 and max(everything.values()) < 305  # and from a quarter
    assert assign_set(sets, "chair", None) == assign_set(sets, "chair", None)


def test_samples_of_a_scene_use_the_same_frame_sets(scene: Scene) -> None:
    options = FrameOptions("scene_sets", 8, sets=3)
    expected = scene_sets(101, 8, 3, 0, SCENE)
    chosen = [select_frames(options, scene, str(i), None) for i in range(50)]
    assert {tuple(positions or ()) for positions in chosen} == {tuple(positions) for positions in expected}
    unseen = set(range(101)).difference(*map(set, expected))
    assert select_frames(options, scene, "chair", frozenset(unseen)) is None  # though the scene shows it


def test_every_protocol_chooses_from_the_scene(scene: Scene, tmp_path: Path) -> None:
    scene = replace(scene, frames=scene.frames[:5])  # equal frames: the first covers what all of them do
    file = tmp_path / "frames.json"
    file.write_text(json.dumps({SCENE: [40, 0, 20]}))
    expected: dict[str, Any] = {"uniform": [0, 2, 4], "coverage": [0], "list": [4, 0, 2]}
    for protocol in get_args(FrameSampling):
        options = FrameOptions(protocol, 3, file=file if protocol == "list" else None)
        options.check()
        chosen = select_frames(options, scene, "chair", frozenset({1}))
        if protocol == "vgllm":
            assert chosen is not None and 1 in chosen
        elif protocol == "scene_sets":
            assert chosen in scene_sets(5, 3, 4, 0, SCENE) and 1 in chosen
        else:
            assert chosen == expected[protocol]  # for every object
        assert select_frames(options, scene, "chair", frozenset()) is None


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ([0, 15], "names frame 15, which is not among its 101 usable frames (1 others have no valid pose)"),
        ([0, 10, 0], "names frame 0 twice"),
        ([0, 10, 20, 30, 40], "has 5 frames, more than frames.count (4)"),
        ([], "must have a list of one or more frame numbers"),
        ([0, True], "must have a list of one or more frame numbers"),
        (["00010"], "must have a list of one or more frame numbers"),
        ("0", "must have a list of one or more frame numbers"),
    ],
)
def test_invalid_frame_lists_raise(scene: Scene, tmp_path: Path, numbers: object, message: str) -> None:
    file = tmp_path / "frames.json"
    file.write_text(json.dumps({SCENE: numbers}))
    with pytest.raises(ValueError) as error:
        frames_from_file(file, scene, 4)
    assert f"{file}: scene {SCENE} {message}" in str(error.value)


def test_unreadable_list_files_raise_with_the_file(scene: Scene, tmp_path: Path) -> None:
    for name, text, message in (
        ("a", json.dumps({"scene0001_00": [0]}), f"there is no scene {SCENE}"),
        ("b", "[1]", "is not a JSON object"),
        ("c", '{"scene', "is not valid JSON"),
        ("d", None, "does not exist"),
    ):
        file = tmp_path / f"{name}.json"
        if text is not None:
            file.write_text(text)
        with pytest.raises(ValueError) as error:
            frames_from_file(file, scene, 4)
        assert str(file) in str(error.value) and message in str(error.value)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"protocol": "random"}, "frames.protocol is 'random'; it must be one of uniform, vgllm, scene_sets, coverage"),
        ({"count": 0}, "frames.count is 0"),
        ({"sets": 0}, "frames.sets is 0"),
        ({"seed": -1}, "frames.seed is -1"),
        ({"ratio": 0.0}, "frames.ratio is 0.0"),
        ({"ratio": 1.1}, "frames.ratio is 1.1"),
        ({"ratio": float("nan")}, "frames.ratio is nan"),
        ({"voxel": 0.0}, "frames.voxel is 0.0"),
        ({"voxel": float("inf")}, "frames.voxel is inf"),
        ({"protocol": "list"}, "frames.file must be set"),
        ({"file": Path("frames.json")}, "frames.file must be set for frames.protocol 'list', and only for it"),
    ],
)
def test_invalid_options_raise_with_the_option(wrong: dict[str, Any], message: str) -> None:
    options = FrameOptions("uniform", 8)
    options.check()
    with pytest.raises(ValueError, match=message):
        replace(options, **wrong).check()
