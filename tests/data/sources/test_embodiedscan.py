"""EmbodiedScan's infos: scenes, skipped scenes and frames, and errors."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hand_scene import ALIGN, CAMERA, moved
from w2r2_ds.data.sources.embodiedscan import read_infos

BOX = [2.0, 5.0, 1.0, 0.8, 0.6, 1.0, 0.1, 0.0, 0.0]


def image(number: int, pose: Any = CAMERA, visible: Any = (0,)) -> dict[str, Any]:
    path = f"scannet/posed_images/scene0000_00/{number:05d}.jpg"
    return {"img_path": path, "cam2global": pose, "visible_instance_ids": list(visible)}


def instance(bbox_id: int = 7, label: int = 4, box: Any = BOX) -> dict[str, Any]:
    return {"bbox_3d": box, "bbox_label_3d": label, "bbox_id": bbox_id}


def scene(name: str = "scannet/scene0000_00", **changes: Any) -> dict[str, Any]:
    return {
        "sample_idx": name,
        "axis_align_matrix": ALIGN,
        "images": [image(0, visible=[0, 1]), image(10, moved(1.0), np.array([1], dtype=np.int64))],
        "instances": [instance(), instance(3, 9, np.array(BOX, dtype=np.float32))],
        **changes,
    }


def content(*scenes: Any, categories: Any = None) -> dict[str, Any]:
    categories = {"chair": 4, "office chair": 9} if categories is None else categories
    return {"metainfo": {"categories": categories, "DATASET": "EmbodiedScan"}, "data_list": list(scenes)}


def written(folder: Path, whole: Any) -> Path:
    path = folder / "embodiedscan_infos_train.pkl"
    path.write_bytes(pickle.dumps(whole, 4))
    return path


def test_reads_a_scene(tmp_path: Path) -> None:
    others = [scene("3rscan/a-b"), scene("matterport3d/x/region0"), scene("matterport3d/x/region1")]
    infos = read_infos(written(tmp_path, content(*others, scene())))
    assert list(infos) == ["scene0000_00"]
    assert infos.skipped == {"3rscan": 1, "matterport3d": 2}
    info = infos["scene0000_00"]
    np.testing.assert_array_equal(info.axis_align, ALIGN)
    assert info.visible == {0: frozenset({0, 1}), 10: frozenset({1})}
    assert sorted(info.poses) == [0, 10]
    np.testing.assert_array_equal(info.poses[10], moved(1.0))
    assert [(each.index, each.bbox_id, each.label) for each in info.instances.values()] == [
        (0, 7, "chair"),
        (1, 3, "office chair"),
    ]
    np.testing.assert_array_equal(info.instances[0].box, BOX)
    np.testing.assert_array_equal(info.instances[1].box, np.array(BOX, dtype=np.float32).astype(np.float64))
    for array in (info.axis_align, info.poses[0], info.instances[1].box):
        assert (type(array), array.dtype) == (np.ndarray, np.float64)


def test_visible_ids_are_indices_into_the_list(tmp_path: Path) -> None:
    """Visible id 7 is an error in a scene of two objects, although one has the bbox_id 7."""
    path = written(tmp_path, content(scene(images=[image(0, visible=[7])])))
    with pytest.raises(ValueError, match=re.escape("scannet/scene0000_00: frame 00000: visible_instance_ids")):
        read_infos(path)


def test_frames_with_lost_tracking_are_skipped(tmp_path: Path) -> None:
    lost = np.full((4, 4), -np.inf)
    info = read_infos(written(tmp_path, content(scene(images=[image(0), image(10, lost), image(20)]))))["scene0000_00"]
    assert (sorted(info.poses), sorted(info.visible)) == ([0, 20], [0, 20])
    with pytest.raises(ValueError, match="scannet/scene0000_00: images"):
        read_infos(written(tmp_path, content(scene(images=[image(0, lost)]))))


def test_scenes_without_objects_are_read(tmp_path: Path) -> None:
    info = read_infos(written(tmp_path, content(scene(instances=[], images=[image(0, visible=[])]))))["scene0000_00"]
    assert (info.instances, info.visible) == ({}, {0: frozenset()})


def alone(only: Any) -> dict[str, Any]:
    """A scene with one instance, which its only frame shows."""
    return scene(images=[image(0, visible=[0])], instances=[only])


def changed(change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    made = scene()
    change(made)
    return made


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (scene(axis_align_matrix=np.eye(3)), "field 'axis_align_matrix'"),
        (scene(axis_align_matrix="x"), "field 'axis_align_matrix'"),
        (scene(axis_align_matrix=np.full((4, 4), np.nan)), "field 'axis_align_matrix'"),
        (changed(lambda s: s.pop("axis_align_matrix")), "field 'axis_align_matrix'"),
        (changed(lambda s: s.pop("images")), "field 'images'"),
        (changed(lambda s: s.pop("instances")), "field 'instances'"),
        (scene(images=[image(0), image(0)]), "images: frame 0"),
        (scene(images=[{**image(0), "img_path": "a/b.jpg"}]), "field 'images[0].img_path'"),
        (scene(images=[None]), "field 'images[0]'"),
        (scene(images=[image(0), image(10, CAMERA[:3])]), "field 'images[1].cam2global'"),
        (scene(images=[image(0, visible=[-1])]), "field 'images[0].visible_instance_ids[0]'"),
        (scene(images=[image(0, visible=[True])]), "field 'images[0].visible_instance_ids[0]'"),
        (scene(images=[{**image(0), "visible_instance_ids": None}]), "field 'images[0].visible_instance_ids'"),
        (alone(instance(box=BOX[:6])), "field 'instances[0].bbox_3d'"),
        (alone(instance(box=[*BOX[:3], 0, *BOX[4:]])), "field 'instances[0].bbox_3d'"),
        (alone(instance(box=[*BOX[:3], -1, *BOX[4:]])), "field 'instances[0].bbox_3d'"),
        (alone(instance(box=[np.inf, *BOX[1:]])), "field 'instances[0].bbox_3d'"),
        (alone(instance(label=5)), "field 'instances[0].bbox_label_3d'"),
        (alone(instance(bbox_id=None)), "field 'instances[0].bbox_id'"),
        (alone(3), "field 'instances[0]'"),
        (scene("scannet/../up"), "scene id '../up'"),
    ],
)
def test_a_malformed_scene_raises_with_its_id(tmp_path: Path, broken: dict[str, Any], message: str) -> None:
    path = written(tmp_path, content(broken))
    with pytest.raises(ValueError, match=re.escape(f"{path}: {broken['sample_idx']}: {message}")):
        read_infos(path)


@pytest.mark.parametrize(
    ("broken", "field"),
    [
        (instance(box=[*BOX[:5], 0.0, *BOX[6:]]), "bbox_3d"),
        (instance(box=[*BOX[:5], np.nan, *BOX[6:]]), "bbox_3d"),
        (instance(box=[-np.inf, *BOX[1:]]), "bbox_3d"),
        (instance(label=5), "bbox_label_3d"),
        (instance(bbox_id=None), "bbox_id"),
    ],
)
def test_a_broken_instance_is_skipped_in_its_scene(tmp_path: Path, broken: dict[str, Any], field: str) -> None:
    """The indices of the other instances do not change."""
    path = written(tmp_path, content(scene(instances=[broken, instance(3, 9)])))
    info = read_infos(path)["scene0000_00"]
    assert {index: (each.index, each.label) for index, each in info.instances.items()} == {1: (1, "office chair")}
    assert info.visible == {0: frozenset({0, 1}), 10: frozenset({1})}
    (message,) = info.broken_instances
    assert message.startswith(f"{path}: scannet/scene0000_00: field 'instances[0].{field}'")


@pytest.mark.parametrize(
    "broken",
    [
        [scene("scannet/scene0007_00", axis_align_matrix=np.full((4, 4), np.nan))],
        [scene("scannet/scene0007_00", instances=[instance(label=5), instance(bbox_id=None)])],
        [scene("scannet/scene0007_00"), scene("scannet/scene0007_00")],
    ],
)
def test_a_broken_scene_is_skipped_in_the_file(tmp_path: Path, broken: list[Any]) -> None:
    path = written(tmp_path, content(*broken, scene()))
    infos = read_infos(path)
    assert list(infos) == ["scene0000_00"] and list(infos.broken) == ["scene0007_00"]
    assert infos.broken["scene0007_00"].startswith(f"{path}: scannet/scene0007_00: field ")
    with pytest.raises(ValueError, match="scene0007_00: field "):  # an error if every scene is broken
        read_infos(written(tmp_path, content(*broken)))


def test_all_problems_are_in_one_error(tmp_path: Path) -> None:
    broken = [scene(f"scannet/scene{n:04d}_00", instances=[instance(label=5)]) for n in range(12)]
    path = written(
        tmp_path, content(*broken, scene("scannet/scene0100_00"), scene("scannet/scene0100_00"), {"images": []})
    )
    with pytest.raises(ValueError, match=f"{path} has 14 ") as caught:
        read_infos(path)
    assert len(str(caught.value).splitlines()) == 11
    path = written(tmp_path, content(scene(), scene(), {"images": []}))
    with pytest.raises(ValueError) as caught:
        read_infos(path)
    for line, place in zip(str(caught.value).splitlines()[1:], ("scannet/scene0000_00", "data_list[2]"), strict=True):
        assert line.startswith(f"{path}: {place}: field 'sample_idx'")


@pytest.mark.parametrize(
    ("whole", "message"),
    [
        ([1], "embodiedscan_infos_train.pkl: "),
        ({"metainfo": {}, "data_list": {}}, "field 'data_list'"),
        (content(scene(), categories={}), "field 'metainfo.categories'"),
        (content(scene(), categories={"chair": "4"}), "field 'metainfo.categories.chair'"),
        (
            content(scene(), categories={"chair": 4, "seat": 4}),
            "field 'metainfo.categories': 'seat' and 'chair' are both 4",
        ),
        (content(scene("3rscan/a")), "holds no ScanNet scene (others: {'3rscan': 1})"),
    ],
)
def test_a_file_of_another_format_raises_with_its_name(tmp_path: Path, whole: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        read_infos(written(tmp_path, whole))
    assert "embodiedscan_infos_train.pkl" in str(caught.value)


def test_a_pickle_that_runs_code_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "embodiedscan_infos_train.pkl"
    path.write_bytes(b"cos\nsystem\n(Vexit 1\ntR.")
    with pytest.raises(ValueError, match=r"embodiedscan_infos_train\.pkl names os\.system"):
        read_infos(path)
