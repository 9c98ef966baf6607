"""Files of a data set with shifts: paired items, pixels, geometry, determinism, reuse."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hand_scene import prepared_items
from shift_fixtures import PLANTED, SHIFTED, cues_of, read_file, scene_pairs, write
from w2r2_ds.commands.prepare import main
from w2r2_ds.data.frames.projection import box_corners, load_depth, project
from w2r2_ds.data.sources.annotations import read_scanrefer
from w2r2_ds.demo.synthetic.options import Options, ShiftOptions
from w2r2_ds.demo.synthetic.write import VERSION

RECORDED = {3: "6d8d502105f42105d713b3b07b4cc7c5bbc9a32e0c567fc07acb7f0441f54d42"}
"""`VERSION` of the generator -> hash of `content` of three data sets."""
CORNER = replace(
    Options(0, 1, 1, (32, 32), 4, 1.0, ShiftOptions(("room_scale",)), "phrases", "corner"),
    questions=("unique_color", "larger", "nearest", "between"),
)
"""Options of a data set with other sentences, questions and coordinates than `SHIFTED` and `PLANTED`."""
REFER, QA = "ScanRefer/ScanRefer_filtered_{}.json", "ScanQA/ScanQA_v1.0_{}.json"


def roots(shifted: Path, planted: Path) -> list[tuple[Path, str]]:
    """(data root, shift) of all five shifts."""
    return [(shifted, name) for name in SHIFTED.shift.names] + [(planted, "position_prior")]


def test_item_i_is_the_same_question_about_the_paired_room(shifted: Path, planted: Path) -> None:
    for root, shift in roots(shifted, planted):
        for file in (REFER, QA):
            items, others = read_file(root, file, "val"), read_file(root, file, f"val_{shift}")
            assert len(items) == len(others) > 10
            for item, other in zip(items, others, strict=True):
                assert item.pop("scene_id").partition("_")[0] == other.pop("scene_id").partition("_")[0]
                assert (item.pop("question_id", "") == other.pop("question_id", "")) == (file == REFER)
                assert item == other
        cues = cues_of(root, shift)
        assert [cue.id for cue in cues] == [each.key for each in read_scanrefer(root / REFER.format(f"val_{shift}"))]
        assert [cue.paired_id for cue in cues] == [each.key for each in read_scanrefer(root / REFER.format("val"))]
        assert {cue.shift for cue in cues} == {shift}
        # A frame shows the object in the shifted room too. Exceptions without a cue: see the tests of the cues.
        assert all(cue.frames for cue in cues) or shift in ("camera", "position_prior")


def test_every_task_is_prepared_from_a_shifted_split(shifted: Path) -> None:
    for task, options in (
        ("scanrefer", {"format": "video3dllm"}),
        ("scanrefer", {"visibility": "depth"}),
        ("scanrefer", {}),
        ("scan2cap", {}),
        ("scanqa", {"format": "video3dllm"}),
        ("detection", {"step": 1, "interval": 1}),
    ):
        items, others = (prepared_items(shifted, task, split, 4, **options) for split in ("val", "val_camera"))
        assert len(items) == len(others) > 1
        for item, other in zip(items, others, strict=True):
            assert (item.question == other.question) or task in ("scan2cap", "detection")  # a position in the camera
    ids = {cue.id for cue in cues_of(shifted, "camera")}
    assert {item.id for item in prepared_items(shifted, "scanrefer", "val_camera", 4)} == ids


def test_only_shifts_with_the_same_pixels_have_the_images_of_val(shifted: Path, planted: Path) -> None:
    for root, shift in roots(shifted, planted):
        for scene, other in scene_pairs(root, cues_of(root, shift)).values():
            same = [
                frame.color.read_bytes() == changed.color.read_bytes()
                for frame, changed in zip(scene.frames, other.frames, strict=True)
            ]
            assert all(same) if shift in ("room_scale", "position_prior") else not any(same)


def test_room_scale_scales_all_lengths(shifted: Path) -> None:
    factor = SHIFTED.shift.room_factor
    for scene, other in scene_pairs(shifted, cues_of(shifted, "room_scale")).values():
        np.testing.assert_array_equal(scene.intrinsic, other.intrinsic)
        np.testing.assert_allclose(other.axis_align[:3, 3], scene.axis_align[:3, 3] * factor, atol=1e-11)
        for object_id, instance in scene.instances.items():
            np.testing.assert_allclose(other.instances[object_id].box, instance.box * factor, rtol=1e-12)
        for frame, scaled in zip(scene.frames, other.frames, strict=True):
            np.testing.assert_allclose(scaled.cam_to_world[:3, 3], frame.cam_to_world[:3, 3] * factor, atol=1e-9)
            np.testing.assert_allclose(scaled.cam_to_world[:3, :3], frame.cam_to_world[:3, :3], atol=1e-9)
            raw, raw_scaled = (np.loadtxt(each.color.with_suffix(".txt")) for each in (frame, scaled))
            np.testing.assert_allclose(raw_scaled[:3, 3], raw[:3, 3] * factor, atol=1e-9)
            # Both depth images are rounded to millimetres.
            difference = load_depth(scaled) - load_depth(frame) * factor
            assert np.abs(difference).max() <= 0.5 + 1e-9


def test_depth_pixels_lie_in_the_boxes_of_the_shifted_scene(shifted: Path, planted: Path) -> None:
    """With the shifted poses, intrinsics, depths and boxes: pixels inside a box are inside its projection."""
    checked = 0
    for root, shift in roots(shifted, planted):
        cues = cues_of(root, shift)
        pairs = scene_pairs(root, cues)
        for cue in cues:
            _, scene = pairs[cue.scene_id]
            box = np.array(cue.truth)
            np.testing.assert_allclose(box[:6], scene.instances[cue.object_id].box, atol=1e-6)
            for frame in (scene.frames[each.frame] for each in cue.frames):
                depth = load_depth(frame) / 1000.0
                rows, columns = np.indices(depth.shape)
                rays = np.stack([columns, rows, np.ones_like(rows)], axis=-1) @ np.linalg.inv(scene.intrinsic[:3, :3]).T
                points = (rays * depth[..., None]) @ frame.cam_to_world[:3, :3].T + frame.cam_to_world[:3, 3]
                inside = (np.abs(points - box[:3]) <= box[3:6] / 2 + 0.005).all(axis=-1)
                corners, along = project(box_corners(box), frame.cam_to_world, scene.intrinsic)
                assert inside.any()
                if (along <= 0.05).any():
                    continue  # partly beside the camera: its corners do not bound it in the image
                low, high = corners.min(axis=0) - 1, corners.max(axis=0) + 1
                within = (columns >= low[0]) & (columns <= high[0]) & (rows >= low[1]) & (rows <= high[1])
                assert not (inside & ~within).any()
                checked += 1
    assert checked > 100


def rounded(value: Any) -> Any:
    """JSON value whose numbers are rounded to 1e-6, since CPUs round differently; -0 is 0."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return round(value, 6) + 0.0 if isinstance(value, float) else value


def content(root: Path) -> str:
    """Hash of sentences, questions, answers, boxes, cues and poses of a data set, without its images."""
    found: dict[str, Any] = {}
    for folder in ("ScanRefer", "ScanQA", "proposals", "shortcut_cues"):
        for file in sorted((root / folder).glob("*.json*")):
            lines = file.read_text().splitlines() if file.suffix == ".jsonl" else [file.read_text()]
            found[file.name] = [rounded(json.loads(line)) for line in lines]
    for file in sorted(root.glob("scannet_data/*.npy")):
        found[file.name] = rounded(np.load(file).tolist())
    for file in sorted(root.glob("posed_images/*/*.txt")):
        found[str(file.relative_to(root))] = rounded(np.loadtxt(file).tolist())
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def test_another_content_has_another_version(shifted: Path, planted: Path, tmp_path: Path) -> None:
    """A changed rule of the generator must raise `VERSION`, else data of both rules count as equal.

    If this fails: raise `VERSION` in `demo/synthetic/write.py` and record its hash here.
    """
    corner = write(tmp_path / "corner", CORNER).root
    hashes = [content(root) for root in (shifted, planted, corner)]
    assert {VERSION: hashlib.sha256("".join(hashes).encode()).hexdigest()} == RECORDED


def digests(root: Path) -> dict[str, str]:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.distributed
def test_same_options_same_bytes_in_any_number_of_processes(shifted: Path, tmp_path: Path) -> None:
    assert digests(write(tmp_path / "again", SHIFTED, workers=2).root) == digests(shifted)


def test_rooms_without_a_changed_layout_are_those_without_shifts(tmp_path: Path) -> None:
    """The training split is the same, and so are the validation rooms; their sentences may be others."""
    options = Options(2, 1, 1, (64, 48), 4, 1.0, ShiftOptions(("furniture_scale",)))
    made = digests(write(tmp_path / "shift", options).root)
    plain = digests(write(tmp_path / "plain", replace(options, shift=ShiftOptions())).root)
    same = [name for name in plain if "_train" in name or "scene0000_00" in name]
    assert len(same) > 15
    assert {name: made[name] for name in same} == {name: plain[name] for name in same}
    images = [name for name in plain if name.startswith("posed_images/scene5000_00") and name.endswith(".jpg")]
    assert len(images) == 4
    assert {name: made[name] for name in images} == {name: plain[name] for name in images}


def test_the_manifest_has_the_shift_and_only_the_same_one_is_reused(planted: Path, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(planted, root)
    again = write(root, PLANTED)
    assert again.reused
    assert again.manifest["options"]["shift"]["names"] == ["position_prior"]
    assert again.manifest["counts"]["val_position_prior_scenes"] == 2
    weaker = replace(PLANTED, shift=replace(PLANTED.shift, prior_strength=0.7))
    for other in (weaker, replace(PLANTED, shift=ShiftOptions()), replace(PLANTED, objects=1.5)):
        with pytest.raises(ValueError, match=r"(shift|objects) .* instead of"):
            write(root, other)
    shutil.rmtree(root / "posed_images" / "scene5001_05")
    with pytest.raises(ValueError, match=r"lacks scene5001_05"):
        write(root, PLANTED)


def test_a_data_set_made_before_an_option_existed_has_its_default(tmp_path: Path) -> None:
    options = Options(2, 1, 1, (64, 48), 4)
    root = write(tmp_path / "data", options).root
    manifest = json.loads((root / "manifest.json").read_text())
    del manifest["options"]["shift"], manifest["options"]["objects"]
    (root / "manifest.json").write_text(json.dumps(manifest))
    assert write(root, options).reused
    with pytest.raises(ValueError, match=r"objects 1\.0 instead of 0\.8"):
        write(root, replace(options, objects=0.8))


def test_the_command_writes_the_splits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["synthetic", "--out", str(tmp_path / "data"), "--train_scenes", "1", "--val_scenes", "1", "--workers", "1"]
    words += ["--image_size", "[64,48]", "--frames_per_scene", "4", "--objects", "2"]
    assert main([*words, "--shift", "[room_scale]", "--room_factor", "1.4"]) == 0
    assert "1 val room scale scenes" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "data" / "manifest.json").read_text())
    assert manifest["options"]["objects"] == 2.0
    assert manifest["options"]["shift"]["room_factor"] == 1.4
    assert main([*words, "--shift", "[room]"]) == 1
    assert "furniture_scale" in capsys.readouterr().err
