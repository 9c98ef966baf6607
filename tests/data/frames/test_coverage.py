"""Voxels of a frame, and the greedy selection of frames that cover most voxels."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hand_scene import INTRINSIC, SCENE
from w2r2_ds.data.frames import coverage
from w2r2_ds.data.frames.coverage import covering_frames, frame_voxels, greedy_cover
from w2r2_ds.data.frames.projection import load_depth
from w2r2_ds.data.sources.scannet import Scene, load_scene

SETS = st.lists(st.sets(st.integers(0, 12)), min_size=1, max_size=6).filter(any)


@pytest.fixture
def scene(root: Path) -> Scene:
    return load_scene(root, SCENE)


def cells(codes: np.ndarray) -> np.ndarray:
    """The three indices of each voxel, ``[n, 3]``."""
    return np.stack([(codes >> shift & (1 << 21) - 1) - (1 << 20) for shift in (42, 21, 0)], axis=1)


def arrays(sets: list[set[int]]) -> list[np.ndarray]:
    return [np.array(sorted(each), dtype=np.int64) for each in sets]


def union(sets: list[set[int]], taken: list[int] | tuple[int, ...]) -> set[int]:
    return set().union(*(sets[i] for i in taken))


def plain_greedy(sets: list[set[int]], count: int, ratio: float) -> list[int]:
    """Greedy cover implemented with Python's sets."""
    everything, covered, taken = set().union(*sets), set(), []
    while len(taken) < count and len(covered) / len(everything) < ratio:
        gains = [len(each - covered) for each in sets]
        taken.append(gains.index(max(gains)))
        covered |= sets[taken[-1]]
    return taken


def test_voxels_of_a_wall_by_hand(scene: Scene) -> None:
    # Frame 0 stands at (1, 2, 1.5) and measures a wall 3 m along y. Pixels are 0.075 m apart there, so no voxel of
    # x = 1 -+ 31.5 * 0.075 = -1.3625 .. 3.3625 and z = 1.5 -+ 23.5 * 0.075 = -0.2625 .. 3.2625 is not covered.
    found = cells(frame_voxels(scene.frames[0], INTRINSIC, 0.1))
    assert {tuple(cell) for cell in found.tolist()} == set(itertools.product(range(-14, 35), [50], range(-3, 34)))
    assert len(found) == 49 * 37


def test_a_large_image_is_read_on_a_grid(scene: Scene) -> None:
    depth = np.zeros((480, 640), dtype=np.uint16)
    depth[9, 12] = depth[8, 13] = depth[10, 14] = 2000  # between the grid's pixels
    depth[8, 12] = 2000
    Image.fromarray(depth).save(scene.frames[0].depth)
    intrinsic = np.diag([400.0, 400.0, 1.0, 1.0])
    intrinsic[:2, 2] = (320.0, 240.0)
    # camera: ((12 - 320) / 400 * 2, (8 - 240) / 400 * 2, 2) = (-1.54, -1.16, 2); world: (1 - 1.54, 2 + 2, 1.5 + 1.16)
    assert cells(frame_voxels(scene.frames[0], intrinsic, 0.1)).tolist() == [[-5, 40, 27]]


def test_frames_without_new_voxels_are_not_selected(scene: Scene) -> None:
    # Frame 1 shows the middle of frame 0's wall; frame 2 faces the other way and shows as many voxels as frame 0.
    assert covering_frames(scene, 3, 1.0) == (0, 2)
    assert covering_frames(scene, 3, 0.5) == (0,)
    assert covering_frames(scene, 3, 0.51) == (0, 2)
    assert covering_frames(scene, 1, 1.0) == (0,)


def test_selected_frames_are_sorted(scene: Scene) -> None:
    half = load_depth(scene.frames[2])
    half[:24] = 0
    Image.fromarray(half).save(scene.frames[2].depth)
    turned = replace(scene, frames=(scene.frames[2], scene.frames[1], scene.frames[0]))
    assert covering_frames(turned, 1, 1.0) == (2,)  # the frame that covers most
    assert covering_frames(turned, 3, 1.0) == (0, 2)


def test_each_depth_image_is_read_once_per_scene(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    monkeypatch.setattr(coverage, "load_depth", lambda frame: read.append(frame.index) or load_depth(frame))
    for _ in range(3):
        covering_frames(scene, 2, 0.9, 0.1)
    assert read == [0, 1, 2]


def test_depth_images_without_measurements(scene: Scene) -> None:
    nothing = Image.fromarray(np.zeros((48, 64), dtype=np.uint16))
    nothing.save(scene.frames[0].depth)
    nothing.save(scene.frames[2].depth)
    assert len(frame_voxels(scene.frames[0], INTRINSIC, 0.1)) == 0
    assert covering_frames(scene, 3, 1.0) == (1,)
    nothing.save(scene.frames[1].depth)
    with pytest.raises(ValueError, match=rf"{SCENE}: no depth image holds a measurement"):
        covering_frames(load_scene(scene.frames[0].depth.parents[2], SCENE), 3, 1.0)


def test_implausible_poses_and_depths_raise_with_the_file(scene: Scene) -> None:
    far = scene.frames[1].cam_to_world.copy()
    far[0, 3] = 1e6
    lost = replace(scene, frames=(scene.frames[0], replace(scene.frames[1], cam_to_world=far)))
    with pytest.raises(ValueError, match=r"00001.txt: .* 1e\+06 m from the origin"):
        covering_frames(lost, 2)
    Image.fromarray(np.full((48, 64), 3, dtype=np.uint16)).save(scene.frames[2].depth)
    with pytest.raises(ValueError, match=r"00002.png: read as millimetres, the median depth is 0.003 m"):
        covering_frames(scene, 2)


@given(SETS, st.integers(1, 7), st.sampled_from([0.1, 0.5, 0.9, 1.0]))
def test_greedy_cover_equals_a_naive_implementation(sets: list[set[int]], count: int, ratio: float) -> None:
    assert greedy_cover(arrays(sets), count, ratio) == plain_greedy(sets, count, ratio)


@given(SETS, st.integers(1, 3))
def test_greedy_cover_reaches_1_minus_1_over_e_of_the_optimum(sets: list[set[int]], count: int) -> None:
    """G. Nemhauser et al., 1978: greedy covers at least 1 - 1/e of the best `count` sets."""
    taken = greedy_cover(arrays(sets), count, 1.0)
    best = max(len(union(sets, some)) for some in itertools.combinations(range(len(sets)), min(count, len(sets))))
    assert len(union(sets, taken)) >= (1 - 1 / math.e) * best


@given(SETS, st.sampled_from([0.3, 0.6, 0.9, 1.0]))
def test_a_larger_count_extends_the_selection(sets: list[set[int]], ratio: float) -> None:
    longest = greedy_cover(arrays(sets), len(sets), ratio)
    assert len(union(sets, longest)) / len(set().union(*sets)) >= ratio
    for count in range(1, len(longest) + 1):
        assert greedy_cover(arrays(sets), count, ratio) == longest[:count]
        assert union(sets, longest[:count]) > union(sets, longest[: count - 1])
