"""Synthetic rooms: reproducible, geometrically exact, and described without ambiguity."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hand_scene import prepared_items, reasons
from synthetic_truth import SCENES, boxes, matching_object, matching_objects, rebuild_room
from w2r2_ds.data.frames.projection import box_corners, load_depth, project
from w2r2_ds.data.sources.scannet import load_scene
from w2r2_ds.demo.synthetic.options import Options, scene_id, scene_seed
from w2r2_ds.demo.synthetic.relations import resolve
from w2r2_ds.demo.synthetic.render import Renderer, pinhole
from w2r2_ds.demo.synthetic.rooms import RoomObject, make_room
from w2r2_ds.demo.synthetic.sentences import make_sentences
from w2r2_ds.demo.synthetic.write import Written, write_dataset


def entries(root: Path) -> list[dict[str, Any]]:
    return [item for split in ("train", "val") for item in json.loads((annotations(root, split)).read_text())]


def annotations(root: Path, split: str) -> Path:
    return root / "ScanRefer" / f"ScanRefer_filtered_{split}.json"


def digests(root: Path) -> dict[str, str]:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.distributed
def test_same_seed_same_bytes_in_any_number_of_processes(rooms: Written, tmp_path: Path) -> None:
    again = write_dataset(tmp_path / "again", 7, 2, 1, (160, 120), 12, workers=2)
    assert not again.reused
    assert digests(again.root) == digests(rooms.root)
    assert [path.name for path in tmp_path.iterdir()] == ["again"]  # nothing is left beside it


def test_other_seeds_give_other_rooms(rooms: Written, tmp_path: Path) -> None:
    other = write_dataset(tmp_path / "other", 8, 1, 1, (64, 48), 12)
    assert not np.array_equal(boxes(other.root, SCENES[0]), boxes(rooms.root, SCENES[0]))
    assert not np.array_equal(boxes(rooms.root, SCENES[0]), boxes(rooms.root, SCENES[2]))


def test_splits_share_neither_seeds_nor_names() -> None:
    for make in (scene_id, lambda split, index: scene_seed(3, split, index)):
        assert not {make("train", i) for i in range(5000)} & {make("val", i) for i in range(5000)}


def test_layout_and_manifest(rooms: Written) -> None:
    assert sorted(path.name for path in (rooms.root / "posed_images").iterdir()) == list(SCENES)
    manifest = json.loads((rooms.root / "manifest.json").read_text())
    assert manifest == rooms.manifest
    assert manifest["seed"] == 7
    assert manifest["counts"]["frames"] == 36
    assert manifest["counts"]["train_descriptions"] == len(json.loads(annotations(rooms.root, "train").read_text()))
    for name in SCENES:
        with Image.open(rooms.root / "contact_sheets" / f"{name}.png") as sheet:
            assert sheet.width == 1440
            assert len(np.unique(np.asarray(sheet.convert("RGB").resize((60, 30))).reshape(-1, 3), axis=0)) > 200


@pytest.mark.parametrize("name", SCENES)
def test_alignment_maps_the_raw_world_to_the_boxes(rooms: Written, name: str) -> None:
    scene = load_scene(rooms.root, name)
    assert abs(scene.axis_align[0, 1]) > 0.1
    assert np.abs(scene.axis_align[:3, 3]).max() > 0.1
    assert len(scene.frames) == 12
    for frame in scene.frames:
        rotation = frame.cam_to_world[:3, :3]
        np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-9)
        assert np.linalg.det(rotation) > 0
        assert rotation[2, 2] < -0.1  # points down
        assert rotation[2, 1] < -0.5  # the image's y axis points down


@pytest.mark.parametrize("name", SCENES)
def test_depth_pixels_lie_in_the_described_box(rooms: Written, name: str) -> None:
    """Back-project each sample's target frame: many pixels inside the projected box must fall into the 3-D box."""
    scene = load_scene(rooms.root, name)
    split = "val" if name == SCENES[2] else "train"
    samples = prepared_items(rooms.root, "scanrefer", split, 12, visibility="depth")
    assert not reasons(samples)  # only what is visible is described
    for sample in (sample for sample in samples if sample.scene_id == name):
        answer = json.loads(sample.answer.strip("`").removeprefix("json"))
        frame, box = scene.frames[answer["frame"]], sample.target.box[:6]
        depth = load_depth(frame) / 1000.0
        rows, columns = np.indices(depth.shape)
        inverse = np.linalg.inv(scene.depth_intrinsic[:3, :3])
        rays = np.stack([columns, rows, np.ones_like(rows)], axis=-1) @ inverse.T
        points = (rays * depth[..., None]) @ frame.cam_to_world[:3, :3].T + frame.cam_to_world[:3, 3]
        inside = (np.abs(points - box[:3]) <= box[3:] / 2 + 0.005).all(axis=-1)
        corners, along = project(box_corners(box), frame.cam_to_world, scene.intrinsic)
        if (along <= 0.05).any():
            continue  # partly beside the camera: its corners do not bound it in the image
        low, high = corners.min(axis=0) - 1, corners.max(axis=0) + 1
        within = (columns >= low[0]) & (columns <= high[0]) & (rows >= low[1]) & (rows <= high[1])
        assert inside.sum() > 25
        assert not (inside & ~within).any()
        floor = np.abs(points[..., 2]) < 0.003
        assert floor.any() or depth.max() < 2.0  # the floor is at height 0


def test_renderer_agrees_with_the_projection() -> None:
    """Every pixel that the renderer gives to an object back-projects into that object's box."""
    room = make_room(np.random.default_rng(3), 4)
    matrix = pinhole((96, 72))
    renderer = Renderer(room, (96, 72), matrix)
    seen: set[int] = set()
    for camera in room.cameras:
        color, depth, owner = renderer.render(camera)
        assert color.shape == (72, 96, 3)
        assert color.dtype == np.uint8
        assert depth.dtype == np.uint16
        rows, columns = np.nonzero(owner >= 0)
        rays = np.stack([columns, rows, np.ones_like(rows)], axis=1) @ np.linalg.inv(matrix[:3, :3]).T
        points = rays * depth[rows, columns, None] / 1000.0 @ camera[:3, :3].T + camera[:3, 3]
        targets = np.stack([room.objects[i].box for i in owner[rows, columns]])
        assert (np.abs(points - targets[:, :3]) <= targets[:, 3:] / 2 + 0.002).all()
        seen |= set(owner[rows, columns].tolist())
    assert len(seen) > 8


SENTENCE = re.compile(
    r"(?:the |find the |of all the )(?P<size>largest |smallest )?(?P<what>.+?)"
    r"(?:, it is the one | that is | that stands | )"
    r"(?:in the room|(?P<how>nearest to|farthest from) the (?P<a>.+)|between the (?P<b>.+) and the (?P<c>.+))\."
)


def referred_object(objects: Sequence[RoomObject], text: str) -> int:
    """Id of the object that a sentence refers to, from distances between centres."""
    match = SENTENCE.fullmatch(text)
    assert match, text
    candidates = matching_objects(objects, match["what"])
    assert len(candidates) > 1, text
    if match["size"]:
        ordered = sorted(candidates, key=lambda o: float(np.prod(o.box[3:])))
        return ordered[-1 if match["size"] == "largest " else 0].object_id
    places = [matching_object(objects, match[key]).box[:2] for key in "abc" if match[key]]
    if match["how"]:
        ordered = sorted(candidates, key=lambda o: float(np.linalg.norm(o.box[:2] - places[0])))
        return ordered[-1 if match["how"].startswith("far") else 0].object_id
    # between: the least detour on the way from one anchor to the other
    return min(
        candidates, key=lambda o: float(np.linalg.norm(o.box[:2] - places[0]) + np.linalg.norm(o.box[:2] - places[1]))
    ).object_id


@pytest.mark.parametrize("name", SCENES)
def test_sentences_refer_to_their_object(rooms: Written, name: str) -> None:
    objects = rebuild_room(rooms.root, name).objects
    mine = [item for item in entries(rooms.root) if item["scene_id"] == name]
    assert 6 <= len(mine) <= 10
    assert len({item["description"] for item in mine}) == len(mine)
    for item in mine:
        assert referred_object(objects, item["description"]) == int(item["object_id"]), item["description"]
        assert objects[int(item["object_id"])].name.replace(" ", "_") == item["object_name"]
        assert " ".join(item["token"]).replace(" .", ".").replace(" ,", ",") == item["description"]
    assert len({(item["object_id"], item["ann_id"]) for item in mine}) == len(mine)


def test_many_rooms_have_distractors_and_clear_sentences() -> None:
    relations: Counter[str] = Counter()
    for seed in range(12):
        rng = np.random.default_rng(seed)
        room = make_room(rng, 8)
        sentences = make_sentences(rng, room.objects, range(len(room.objects)), 10)
        assert len(sentences) >= 6
        relations.update(sentence.relation for sentence in sentences)
        for sentence in sentences:
            assert referred_object(room.objects, sentence.text) == sentence.object_id, sentence.text
        for one in room.objects:
            for other in room.objects[: one.object_id]:
                assert (np.abs(one.box[:3] - other.box[:3]) * 2 > one.box[3:] + other.box[3:]).any()
    assert set(relations) == {"nearest", "farthest", "between", "largest", "smallest"}


def test_ambiguous_relations_have_no_object() -> None:
    def at(object_id: int, name: str, x: float) -> RoomObject:
        box = np.array([x, 0.0, 0.5, 0.4, 0.4, 1.0])
        return RoomObject(object_id, name, "red", box, np.concatenate([box, np.zeros(3)]))

    clear = [at(0, "window", 0.0), at(1, "chair", 1.0), at(2, "chair", 2.0)]
    assert resolve(clear, "chair", None, "nearest", (0,)) == 1
    assert resolve(clear, "chair", "red", "farthest", (0,)) == 2
    assert resolve(clear, "chair", "blue", "nearest", (0,)) is None
    assert resolve(clear, "chair", None, "largest", ()) is None  # equal sizes
    assert resolve(clear, "chair", None, "nearest", (1,)) is None  # one of the chairs itself
    assert (
        resolve([at(0, "window", 0.0), at(1, "chair", 1.0), at(2, "chair", 1.2)], "chair", None, "nearest", (0,))
        is None
    )


def test_reuse_and_errors(rooms: Written, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(rooms.root, root)
    again = write_dataset(root, 7, 2, 1, (160, 120), 12)
    assert again.reused
    assert again.message.startswith(f"reusing {root}: 2 train scenes, 1 val scenes")
    with pytest.raises(ValueError, match=r"made with seed 7 instead of 6; use another folder"):
        write_dataset(root, 6, 2, 1, (160, 120), 12)
    shutil.rmtree(root / "posed_images" / "scene0001_00")
    with pytest.raises(ValueError, match="lacks scene0001_00; remove the folder"):
        write_dataset(root, 7, 2, 1, (160, 120), 12)
    (root / "manifest.json").write_text('{"version": 1')
    with pytest.raises(ValueError, match=r"exists but has no readable manifest.json"):
        write_dataset(root, 7, 2, 1, (160, 120), 12)


def test_a_failed_call_leaves_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("w2r2_ds.demo.synthetic.scene.write_sheet", fail)
    with pytest.raises(OSError, match="disk full"):
        write_dataset(tmp_path / "data", 0, 1, 1, (64, 48), 12)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((-1, 1, 1, (64, 48), 4), "seed is -1"),
        ((0, 0, 1, (64, 48), 4), "train_scenes and val_scenes"),
        ((0, 1, 5001, (64, 48), 4), "train_scenes and val_scenes"),
        ((0, 1, 1, (64, 8), 4), "image_size is"),
        ((0, 1, 1, (64, 48), 1), "frames_per_scene is 1"),
    ],
)
def test_errors_name_the_option(options: tuple[int, int, int, tuple[int, int], int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Options(*options)
