"""Annotations of synthetic rooms in EmbodiedScan's format, and proposals."""

from __future__ import annotations

import json
import pickle
from typing import Any

import numpy as np
import pytest
import torch

from synthetic_truth import SCENES, boxes, rebuild_room
from w2r2_ds.boxes3d.iou import box_iou
from w2r2_ds.boxes3d.transforms import corners
from w2r2_ds.data.frames.projection import MIN_VISIBLE_FRACTION, load_depth, visible_fraction
from w2r2_ds.data.sources.scannet import load_scene
from w2r2_ds.demo.synthetic.annotations import ABSENT, BAD, propose
from w2r2_ds.demo.synthetic.rooms import Room
from w2r2_ds.demo.synthetic.write import Written


def infos(rooms: Written) -> dict[str, dict[str, Any]]:
    """Scene -> entry with inverted ``categories``, of both splits."""
    found = {}
    for split in ("train", "val"):
        content = pickle.loads((rooms.root / "embodiedscan" / f"embodiedscan_infos_{split}.pkl").read_bytes())
        assert set(content) == {"metainfo", "data_list"}
        names = {number: name for name, number in content["metainfo"]["categories"].items()}
        assert len(names) == len(content["metainfo"]["categories"]) == 15
        for info in content["data_list"]:
            found[info["sample_idx"].removeprefix("scannet/")] = info | {"names": names}
    return found


def test_pickle_holds_arrays_and_containers_only(rooms: Written) -> None:
    called = set()

    class Reader(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            called.add((module.removeprefix("numpy.").split(".")[-1], name))
            return super().find_class(module, name)

    with (rooms.root / "embodiedscan" / "embodiedscan_infos_train.pkl").open("rb") as file:
        Reader(file).load()
    assert called == {("multiarray", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype")}


@pytest.mark.parametrize("name", SCENES)
def test_info_agrees_with_the_files(rooms: Written, name: str) -> None:
    info, scene = infos(rooms)[name], load_scene(rooms.root, name)
    assert len(info["images"]) == len(scene.frames) == 12
    np.testing.assert_array_equal(np.round(info["axis_align_matrix"], 12), scene.axis_align)
    np.testing.assert_allclose(info["cam2img"], scene.intrinsic, atol=1e-11)
    np.testing.assert_allclose(info["depth_cam2img"], scene.depth_intrinsic, atol=1e-11)
    for frame, image in zip(scene.frames, info["images"], strict=True):
        assert image["img_path"] == f"scannet/posed_images/{name}/{frame.color.name}"
        assert image["depth_path"] == f"scannet/posed_images/{name}/{frame.depth.name}"
        pose = np.loadtxt(frame.color.with_suffix(".txt"))
        np.testing.assert_allclose(image["cam2global"], pose, atol=1e-11)
        depth = load_depth(frame)
        visible = [
            i
            for i, instance in scene.instances.items()
            if visible_fraction(instance.box, frame.cam_to_world, scene.depth_intrinsic, depth) >= MIN_VISIBLE_FRACTION
        ]
        assert image["visible_instance_ids"] == visible
    assert any(image["visible_instance_ids"] for image in info["images"])


@pytest.mark.parametrize("name", SCENES)
def test_oriented_boxes_are_the_bounds_of_the_vertices(rooms: Written, name: str) -> None:
    """Bounds along the object's own axes; equal to ScanRefer's box if the object is not rotated."""
    info, room, stored = infos(rooms)[name], rebuild_room(rooms.root, name), boxes(rooms.root, name)
    words = {"sofa": "couch", "bookshelf": "shelf", "nightstand": "stand", "trash can": "bin"}
    assert [instance["bbox_id"] for instance in info["instances"]] == list(range(len(stored)))
    for o, row, instance in zip(room.objects, stored, info["instances"], strict=True):
        assert info["names"][instance["bbox_label_3d"]] == words.get(o.name, o.name)
        box = np.array(instance["bbox_3d"])
        assert box.shape == (9,)
        c, s = np.cos(box[6]), np.sin(box[6])
        own = room.vertices[np.unique(room.faces[room.face_objects == o.object_id])] - box[:3]
        own = own @ np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])
        np.testing.assert_allclose(own.max(axis=0), box[3:6] / 2, atol=1e-9)
        np.testing.assert_allclose(own.min(axis=0), -box[3:6] / 2, atol=1e-9)
        if abs(np.sin(2 * box[6])) < 1e-9:
            np.testing.assert_allclose(corners(box).max(axis=0), row[:3] + row[3:6] / 2, atol=1e-9)


def test_oriented_boxes_match_scanrefer_boxes(many_rooms: list[Room]) -> None:
    """IoU of at least 0.5, the usual threshold to match both annotations; below 1 for rotated furniture."""
    objects = [o for room in many_rooms for o in room.objects]
    first = torch.tensor(np.array([o.oriented for o in objects]))
    second = torch.tensor(np.array([[*o.box, 0.0, 0.0, 0.0] for o in objects]))
    overlap = box_iou(first, second)
    assert overlap.min() >= 0.5
    turned = (first[:, 6] * 2).sin().abs() > 0.1
    assert 0.1 < turned.double().mean() < 0.6
    assert overlap[turned].max() < 0.99
    assert overlap[~turned].min() > 0.9


def test_proposals_file(rooms: Written) -> None:
    count = 0
    for split, names in (("train", SCENES[:2]), ("val", SCENES[2:])):
        content = json.loads((rooms.root / "proposals" / f"scannet_{split}_pred_box.json").read_text())
        assert list(content) == [f"scannet/{name}" for name in names]
        for rows in content.values():
            values = np.array(rows)
            assert values.shape == (len(rows), 6)
            assert (values[:, 3:] > 0).all()
            count += len(rows)
    assert count == rooms.manifest["counts"]["train_proposals"] + rooms.manifest["counts"]["val_proposals"]


def test_iou_of_proposals(many_rooms: list[Room]) -> None:
    """Best IoU of each object over the proposals of its room, and of each proposal over the objects."""
    recall, false, exact = [], [], 0
    for seed, room in enumerate(many_rooms):
        proposed, real = propose(np.random.default_rng(seed), room), np.stack([o.box for o in room.objects])
        pairs = (np.repeat(real, len(proposed), axis=0), np.tile(proposed, (len(real), 1)))
        upright = [torch.tensor(np.pad(boxes, ((0, 0), (0, 3)))) for boxes in pairs]
        overlap = box_iou(*upright).reshape(len(real), len(proposed)).numpy()
        recall += list(overlap.max(axis=1))
        false.append(int((overlap.max(axis=0) == 0).sum()))
        exact += int((overlap > 0.999).sum())
    missed = np.mean(np.array(recall) < 0.5)
    assert missed == pytest.approx(ABSENT + BAD, abs=0.05)  # of 600 objects: three standard errors
    assert exact == 0
    assert 0.7 < np.median(recall) < 0.95
    assert min(false) >= 1
    assert max(false) <= 8
