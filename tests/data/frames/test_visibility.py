"""Object visibility by EmbodiedScan's lists and by depth images, and the clearest frame of an object."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hand_scene import ALIGN, CAMERA, INTRINSIC, SCENE, moved
from w2r2_ds.data.frames import visibility
from w2r2_ds.data.frames.projection import load_depth, projected_area
from w2r2_ds.data.frames.visibility import (
    clear_area,
    clearest_frame,
    keep_listed_frames,
    match_instance,
    visible_frames_by_depth,
    visible_frames_by_infos,
)
from w2r2_ds.data.sources.embodiedscan import InfoInstance, ScanInfo
from w2r2_ds.data.sources.frames import Frame, SceneParts
from w2r2_ds.data.sources.scannet import Scene, alignment_file, load_scene

SIZE = (64, 48)


@pytest.fixture
def scene(root: Path) -> Scene:
    return load_scene(root, SCENE)


def instance(index: int, *box: float, bbox_id: int = 50) -> InfoInstance:
    return InfoInstance(index, bbox_id, "chair", np.array(box))


def make_info(visible: dict[int, set[int]], *instances: InfoInstance, shift: float = 0.0) -> ScanInfo:
    """Annotations with the poses of the hand-made scene; frames other than 1 have the pose of frame 0."""
    poses = {number: np.linalg.inv(ALIGN) @ moved(1.0 if number == 1 else shift) for number in visible}
    by_index = {instance.index: instance for instance in instances}
    return ScanInfo(SCENE, ALIGN, {number: frozenset(ids) for number, ids in visible.items()}, poses, by_index)


def test_only_listed_frames_are_candidates(scene: Scene) -> None:
    listed = keep_listed_frames(scene, make_info({1: set(), 70: set()}))
    assert [frame.index for frame in listed.frames] == [1]
    assert listed.instances is scene.instances


def test_a_scan_without_alignment_raises_with_its_file(root: Path) -> None:
    alignment_file(root, SCENE).write_text("colorWidth = 1296\n")
    raw = load_scene(root, SCENE, SceneParts.POSES)  # as detection reads it
    with pytest.raises(ValueError, match=rf"axisAlignment in scans/{SCENE}/{SCENE}.txt is missing or differs"):
        keep_listed_frames(raw, make_info({0: set()}))


def test_another_numbering_of_the_images_raises(scene: Scene) -> None:
    with pytest.raises(ValueError, match=rf"{SCENE}: none of its 3 frames is among the 2 that EmbodiedScan lists"):
        keep_listed_frames(scene, make_info({70: set(), 80: set()}))
    assert len(keep_listed_frames(scene, make_info({0: set()}, shift=0.04)).frames) == 1
    with pytest.raises(
        ValueError, match=r"00000.jpg: its camera is 0.06 m from where EmbodiedScan has frame 0 of.*own numbers"
    ):
        keep_listed_frames(scene, make_info({0: set()}, shift=0.06))


def test_visible_ids_are_indices_into_the_list_of_instances(scene: Scene) -> None:
    sparse = replace(scene, frames=tuple(replace(scene.frames[0], index=number) for number in (0, 10, 30, 40)))
    chair = instance(1, 0, 0, 0, 1, 1, 1, 0, 0, 0, bbox_id=0)
    info = make_info({0: {0}, 10: {0, 1}, 20: {1}, 30: set(), 40: {1}}, instance(0, *chair.box, bbox_id=1), chair)
    assert visible_frames_by_infos(sparse, info, chair) == {1, 3}
    with pytest.raises(AssertionError, match="frame 1"):
        visible_frames_by_infos(scene, info, chair)


def test_matching_takes_the_exact_overlap_of_turned_boxes() -> None:
    ours = np.array([0.0, 0.0, 0.0, 1.0, 1.0, 1.0])
    # A cube turned by 45 degrees overlaps by an octagon: IoU 0.707. The box around it would have IoU 0.5.
    turned = instance(0, 0, 0, 0, 1, 1, 1, np.pi / 4, 0, 0)
    shifted = instance(1, 0.25, 0, 0, 1, 1, 1, 0, 0, 0)  # IoU 0.75 / 1.25 = 0.6
    assert match_instance(ours, make_info({}, turned, shifted)) is turned
    nearer = instance(2, 0.125, 0, 0, 1, 1, 1, 0, 0, 0)  # IoU 0.875 / 1.125 = 0.78
    assert match_instance(ours, make_info({}, turned, shifted, nearer)) is nearer


def test_the_smallest_iou_that_matches() -> None:
    ours = np.array([0.0, 0.0, 0.0, 1.0, 1.0, 1.0])
    half, less = (instance(0, 0, 0, 0, size, 1, 1, 0, 0, 0) for size in (2.0, 2.001))
    assert match_instance(ours, make_info({}, half)) is half
    assert match_instance(ours, make_info({}, less)) is None
    assert match_instance(ours, make_info({})) is None
    same = [instance(i, *ours, 0, 0, 0) for i in range(2)]
    assert match_instance(ours, make_info({}, *same)) is same[0]


def test_visibility_by_depth(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    monkeypatch.setattr(visibility, "load_depth", lambda frame: read.append(frame.index) or load_depth(frame))
    ids = sorted(scene.instances)
    seen = dict(zip(ids, visible_frames_by_depth(scene, [scene.instances[i].box for i in ids]), strict=True))
    assert seen == {0: {0, 1}, 3: set(), 4: {0, 1}}  # 3 is hidden; frame 2 faces away
    assert read == [0, 1, 2]


def test_a_wrong_depth_scale_raises(scene: Scene) -> None:
    Image.fromarray(np.full((48, 64), 3, dtype=np.uint16)).save(scene.frames[2].depth)
    with pytest.raises(ValueError, match=r"00002.png: read as millimetres, the median depth is 0.003 m"):
        visible_frames_by_depth(scene, [scene.instances[0].box])


def test_the_clearest_frame_has_the_largest_projected_area(scene: Scene) -> None:
    box = scene.instances[0].box
    assert clearest_frame(scene.frames, [0, 1], box, INTRINSIC, SIZE) == 1  # one metre nearer
    assert clearest_frame(scene.frames, [0], box, INTRINSIC, SIZE) == 0
    assert clearest_frame(scene.frames, [2], box, INTRINSIC, SIZE) is None  # behind the camera
    assert clearest_frame(scene.frames, [], box, INTRINSIC, SIZE) is None
    turned = np.concatenate([box[:3], box[[4, 3, 5]], [np.pi / 2, 0.0, 0.0]])  # the same box with another angle
    assert clearest_frame(scene.frames, [0, 1], turned, INTRINSIC, SIZE) == 1


def test_of_equal_frames_the_first_is_clearest(scene: Scene) -> None:
    frames = [scene.frames[0], scene.frames[1], scene.frames[1], scene.frames[1]]
    box = scene.instances[0].box
    assert clearest_frame(frames, [0, 2, 1, 3], box, INTRINSIC, SIZE) == 2


def test_a_box_that_fills_the_image_from_side_to_side_is_not_clear() -> None:
    wall, floor = np.array([1.0, 4.5, 1.5, 20.0, 1.0, 1.0]), np.array([1.0, 4.5, 1.5, 1.0, 1.0, 20.0])
    for box in (wall, floor):
        assert projected_area(box, CAMERA, INTRINSIC, SIZE) > 0.0
        assert clear_area(box, CAMERA, INTRINSIC, SIZE) == 0.0
    # Over the left border only: the front's right edge is at pixel 31.5 - 0.5 / 2 * 40 = 21.5 and 20 high, the back's
    # at 31.5 - 0.5 / 3 * 40 = 24.83 and 13.33 high, so the hull is a rectangle and a trapezium.
    box = np.array([-0.25, 4.5, 1.5, 1.5, 1.0, 1.0])
    assert clear_area(box, CAMERA, INTRINSIC, SIZE) == pytest.approx(21.5 * 20 + 10 / 3 * (20 + 40 / 3) / 2)


def test_clearest_frame_among_frames_visible_by_depth(scene: Scene) -> None:
    seen = visible_frames_by_depth(scene, [scene.instances[i].box for i in (0, 3)])
    assert (
        clearest_frame(scene.frames, sorted(seen[0]), scene.instances[0].box, INTRINSIC, SIZE) == 1
    )  # one metre nearer
    assert not seen[1]  # hidden in frames 0 and 1, behind the camera in frame 2
    box = scene.instances[0].box
    assert clearest_frame(scene.frames, [0], box, INTRINSIC, SIZE) == 0  # the farther one, where the nearer is blocked


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.5]), min_size=1, max_size=6))
def test_clearest_is_the_first_maximum(forward: list[float]) -> None:
    box = np.array([1.0, 5.0, 1.5, 0.5, 0.5, 0.5])
    frames = [Frame(i, Path(), Path(), moved(metres)) for i, metres in enumerate(forward)]
    assert clearest_frame(frames, range(len(frames)), box, INTRINSIC, SIZE) == forward.index(max(forward))
