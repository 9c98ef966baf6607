"""Whole preparations: files, reuse, resume and errors; every annotation becomes a sample or a skipped item."""

from __future__ import annotations

import json
import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hand_scene import SCENE, entry, question_entry, write_annotations, write_infos, write_proposals, write_questions
from preparations import DEPTH, SECOND, THIRD, contents
from w2r2_ds.config.io import DEMO_RECIPE, load_config
from w2r2_ds.config.schema import SourceConfig
from w2r2_ds.data.dataset import load_mixture
from w2r2_ds.data.frames.selection import FrameOptions
from w2r2_ds.data.prepare import pipeline as preparing
from w2r2_ds.data.prepare.manifest import summary_line
from w2r2_ds.data.prepare.pipeline import SKIPPED_FILE, prepare
from w2r2_ds.data.prepared_set import MANIFEST, PreparedSet, read_manifest
from w2r2_ds.data.sources.frames import LOST_POSE
from w2r2_ds.data.tasks.base import TaskOptions
from w2r2_ds.data.tasks.scan2cap import Scan2Cap
from w2r2_ds.demo.assets import prepare_sets
from w2r2_ds.demo.synthetic.write import Written
from w2r2_ds.utils.parallel import run_all


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / SKIPPED_FILE).read_text().splitlines()]


def test_samples_are_in_the_order_of_the_annotations(scenes: Path) -> None:
    done = prepare(scenes, DEPTH, scenes / "out" / "train", quiet=True)
    made = PreparedSet(done.folder, scenes)
    order = [(each.scene_id, each.target.ann_id) for each in made]
    assert order == [(SECOND, "0"), (SCENE, "1"), (THIRD, "2"), (SCENE, "3"), (SECOND, "4"), (THIRD, "5")]
    for each in made:
        assert each.frames[0] == scenes / "posed_images" / each.scene_id / "00000.jpg"
        np.testing.assert_allclose(each.cam_to_world[0][:3, 3], [1.0, 2.0, 1.5], atol=1e-9)
    assert not list((scenes / "out").glob("*.partial"))


@pytest.mark.parametrize("task", ["scanrefer", "scan2cap"])
def test_decimals_are_in_the_manifest_and_the_samples(scenes: Path, task: str) -> None:
    world = replace(DEPTH, task=task, format="video3dllm")
    for decimals in (2, 1):
        done = prepare(scenes, replace(world, decimals=decimals), scenes / f"out{decimals}", quiet=True)
        assert done.manifest["options"]["decimals"] == decimals
        assert {sample.decimals for sample in PreparedSet(done.folder, scenes)} == {decimals}
    with pytest.raises(ValueError, match="decimals is 1 there and 2 here"):
        prepare(scenes, world, scenes / "out1", quiet=True)


def test_the_manifest_has_options_inputs_counts_and_files(scenes: Path) -> None:
    manifest = prepare(scenes, DEPTH, scenes / "out", quiet=True).manifest
    assert (manifest["task"], manifest["format"], manifest["split"]) == ("scanrefer", "vgllm", "train")
    assert manifest["options"]["frames"]["count"] == 2 and manifest["options"]["visibility"] == "depth"
    assert manifest["options"]["box_angles"] == "vgllm"
    turned = prepare(scenes, replace(DEPTH, box_angles="nearest_heading"), scenes / "turned", quiet=True)
    assert turned.manifest["options"] == {**manifest["options"], "box_angles": "nearest_heading"}
    assert manifest["counts"] == {
        "samples": 6,
        "scenes": 3,
        "frames_without_pose": 3,
        "descriptions": 7,
        "unseen": {"count": 1, "of": 7},
        "published": {"of": "descriptions", "count": 36665, "annotated": 7, "met": False},
    }
    assert manifest["skipped"] == {"no_visible_frame": 1}
    names = set(manifest["inputs"])
    assert {"ScanRefer/ScanRefer_filtered_train.json", "scannetv2-labels.combined.tsv"} <= names
    assert {f"posed_images/{SECOND}", f"scans/{THIRD}/{THIRD}.txt", f"scannet_data/{SCENE}_aligned_bbox.npy"} <= names
    assert set(manifest["files"]) == {f"{SCENE}.parquet", f"{SECOND}.parquet", f"{THIRD}.parquet", SKIPPED_FILE}
    assert manifest == json.loads((scenes / "out" / MANIFEST).read_text())


def test_every_annotation_becomes_samples_or_a_skipped_item(scenes: Path) -> None:
    write_infos(scenes, scene_ids=(SCENE, SECOND, THIRD))
    options = TaskOptions("scanrefer", "train", frames=FrameOptions("vgllm", 1), rolls=2)
    done = prepare(scenes, options, scenes / "out", quiet=True)
    dropped = lines(done.folder)
    assert [(each["id"], each["reason"]) for each in dropped] == [(f"{SCENE}|3|lamp|6", "no_instance_match")]
    assert dropped[0]["location"].endswith("train.json: entry 7")
    assert len(PreparedSet(done.folder, scenes)) == 2 * 6


def test_broken_boxes_and_scenes_of_the_infos_do_not_block_others(scenes: Path) -> None:
    write_infos(scenes, scene_ids=(SCENE, SECOND, THIRD))
    path = scenes / "embodiedscan" / "embodiedscan_infos_train.pkl"
    whole = pickle.loads(path.read_bytes())
    first, _, third = whole["data_list"]
    first["instances"][1]["bbox_3d"] = [0.0] * 9  # of a wall, which no description names
    third["axis_align_matrix"] = None
    unused = {**first, "sample_idx": "scannet/scene0009_00", "instances": first["instances"][1:2] * 4}
    whole["data_list"].append(unused)
    path.write_bytes(pickle.dumps(whole))
    options = TaskOptions("scanrefer", "train", frames=FrameOptions("vgllm", 1), rolls=1)
    with pytest.raises(ValueError, match=rf"1 of 3 scenes cannot be used.*\n.*{THIRD}: field 'axis_align_matrix'"):
        prepare(scenes, options, scenes / "out", skip_broken_scenes=False, quiet=True)
    done = prepare(scenes, options, scenes / "out", quiet=True)
    assert done.manifest["counts"]["scenes"] == 2 and done.manifest["skipped"]["broken_scene"] == 2
    lost, line = done.manifest["skipped_inputs"]  # nothing about the scene that is not in the annotations
    assert LOST_POSE in lost
    assert line.startswith("1 broken boxes in EmbodiedScan's infos") and f"{SCENE}: field 'instances[1]" in line
    assert line in summary_line(done.folder, done.manifest, False)


def test_lost_frames_are_in_the_summary(scenes: Path) -> None:
    images = scenes / "posed_images" / SCENE
    (images / "00001.png").unlink()
    (scenes / "posed_images" / SECOND / "00002.txt").unlink()
    done = prepare(scenes, DEPTH, scenes / "out", quiet=True)
    summary = summary_line(done.folder, done.manifest, False)
    for line in (f"3 {LOST_POSE}", "1 frames without a depth image", "1 frames without a pose file"):
        assert f"  skipped input: {line}, such as " in summary
    assert done.manifest["counts"]["frames_without_pose"] == 3


def test_an_object_with_a_broken_box_is_skipped(scenes: Path) -> None:
    """Without any option: the annotations are right, and the other objects are not affected."""
    path = scenes / "scannet_data" / f"{SCENE}_aligned_bbox.npy"
    rows = np.load(path)
    rows[0, 5] = 0.0
    rows[2, 1] = np.nan
    np.save(path, rows)
    done = prepare(scenes, DEPTH, scenes / "out", quiet=True)
    assert done.manifest["skipped"] == {"broken_box": 2, "no_visible_frame": 1}
    broken = [each for each in lines(done.folder) if each["reason"] == "broken_box"]
    assert [each["id"] for each in broken] == [f"{SCENE}|0|office_chair|1", f"{SCENE}|0|office_chair|3"]
    assert any(line.startswith("2 broken boxes in SCENE_aligned_bbox") for line in done.manifest["skipped_inputs"])


def test_broken_proposals_are_skipped_and_counted(scenes: Path) -> None:
    write_annotations(scenes, [entry()], "val")
    write_proposals(scenes, [[2, 5, 1, 0.8, 0.6, 1], [0, 0, 0, 0, 1, 1]])
    options = TaskOptions("scan2cap", "val", frames=FrameOptions("uniform", 2))
    _, line = prepare(scenes, options, scenes / "out", quiet=True).manifest["skipped_inputs"]
    assert line.startswith("1 broken boxes in the proposals") and f"'scannet/{SCENE}[1]'" in line


def test_validation_of_scan2cap_counts_objects(scenes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_annotations(scenes, [entry(), entry(ann_id=1), entry(4, "table")], "val")
    monkeypatch.setattr(Scan2Cap, "published", {"val": 2})
    options = TaskOptions("scan2cap", "val", frames=FrameOptions("uniform", 2), boxes="annotated")
    counts = prepare(scenes, options, scenes / "out", quiet=True).manifest["counts"]
    assert (counts["objects"], counts["published"]["met"], counts["samples"]) == (2, True, 2)


class Killed(BaseException):
    """An exception that the package does not catch."""


def interrupted(monkeypatch: pytest.MonkeyPatch, when: str) -> list[str]:
    """Kill `prepare` at a scene; returns the list of scenes that were prepared."""
    worked, original = [], preparing.prepare_scene

    def outcomes(root: Path, options: TaskOptions, job: Any, **rest: Any) -> Any:
        worked.append(job.scene_id)
        if job.scene_id == when:
            raise Killed
        return original(root, options, job, **rest)

    monkeypatch.setattr(preparing, "prepare_scene", outcomes)
    return worked


def test_a_killed_preparation_continues(
    scenes: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole = contents(prepare(scenes, DEPTH, scenes / "whole", quiet=True).folder)
    with monkeypatch.context() as patch:
        interrupted(patch, SCENE)
        with pytest.raises(Killed):
            prepare(scenes, DEPTH, scenes / "out", quiet=True)
    assert not (scenes / "out" / MANIFEST).exists() and (scenes / "out" / f"{SECOND}.parquet").is_file()
    (scenes / "out" / f"{SCENE}.parquet").write_bytes(b"half")  # a full disk may truncate a file
    worked = interrupted(monkeypatch, "none")
    caplog.set_level("INFO", "w2r2_ds")
    done = prepare(scenes, DEPTH, scenes / "out", quiet=True)
    assert worked == [SCENE, THIRD]
    assert not list(done.folder.glob("*.empty"))
    assert "1 of 3 scenes are done already" in caplog.text
    assert contents(done.folder) == whole


def test_a_truncated_scene_is_prepared_again(scenes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = contents(prepare(scenes, DEPTH, scenes / "whole", quiet=True).folder)
    with monkeypatch.context() as patch:
        interrupted(patch, SCENE)
        with pytest.raises(Killed):
            prepare(scenes, DEPTH, scenes / "out", quiet=True)
    file = scenes / "out" / f"{SECOND}.parquet"
    file.write_bytes(file.read_bytes()[:-20])
    worked = interrupted(monkeypatch, "none")
    assert contents(prepare(scenes, DEPTH, scenes / "out", quiet=True).folder) == whole
    assert worked == [SECOND, SCENE, THIRD]


def test_scenes_of_other_annotations_are_removed(scenes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        interrupted(patch, THIRD)
        with pytest.raises(Killed):
            prepare(scenes, DEPTH, scenes / "out", quiet=True)
    write_annotations(scenes, [entry()])
    done = prepare(scenes, DEPTH, scenes / "out", quiet=True)
    assert [path.name for path in done.folder.glob("*.parquet")] == [f"{SCENE}.parquet"]
    assert len(PreparedSet(done.folder, scenes)) == 1


@pytest.mark.parametrize("change", ["options", "annotations", "scene"])
def test_scenes_of_other_options_or_inputs_are_prepared_again(
    scenes: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    with monkeypatch.context() as patch:
        interrupted(patch, SCENE)
        with pytest.raises(Killed):
            prepare(scenes, DEPTH, scenes / "out", quiet=True)
    options = replace(DEPTH, frames=FrameOptions("uniform", 3)) if change == "options" else DEPTH
    if change == "annotations":
        file = scenes / "ScanRefer" / "ScanRefer_filtered_train.json"
        file.write_text(file.read_text().replace("The Red Chair.", "The blue chair."))
    if change == "scene":
        file = scenes / "scannet_data" / f"{SECOND}_aligned_bbox.npy"
        boxes = np.load(file)
        boxes[0, 0] += 0.1
        np.save(file, boxes)
    worked = interrupted(monkeypatch, "none")
    prepare(scenes, options, scenes / "out", quiet=True)
    assert worked == [SECOND, SCENE, THIRD]


def test_validation_ignores_rolls(scenes: Path) -> None:
    write_annotations(scenes, [entry(), entry(4, "table")], "val")
    options = replace(DEPTH, split="val", frames=FrameOptions("vgllm", 2), rolls=2)
    made = PreparedSet(prepare(scenes, options, scenes / "out", quiet=True).folder, scenes)
    assert [each.id for each in made] == [f"{SCENE}|0|office_chair|0", f"{SCENE}|4|table|0"]


def test_an_unknown_parquet_file_is_not_deleted(scenes: Path) -> None:
    (scenes / "out").mkdir()
    pq.write_table(pa.table({"a": [1]}), scenes / "out" / "mine.parquet")
    with pytest.raises(ValueError, match=r"out holds mine\.parquet"):
        prepare(scenes, DEPTH, scenes / "out", quiet=True)
    assert (scenes / "out" / "mine.parquet").is_file()


@pytest.mark.distributed
def test_two_processes_write_the_same_bytes(rooms: Written, tmp_path: Path) -> None:
    one = prepare(rooms.root, DEPTH, tmp_path / "one", workers=1, quiet=True)
    two = prepare(rooms.root, DEPTH, tmp_path / "two", workers=2, quiet=True)
    assert contents(one.folder) == contents(two.folder)
    assert one.manifest["counts"]["scenes"] == 2


def test_a_process_that_dies_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"One of 2 "):
        list(run_all(os._exit, [(1,), (1,)], 2))


def test_all_broken_scenes_are_reported(damaged: Path) -> None:
    with pytest.raises(ValueError) as caught:
        prepare(damaged, DEPTH, damaged / "out", skip_broken_scenes=False, quiet=True)
    first, *others = str(caught.value).splitlines()
    assert first.startswith("2 of 3 scenes") and "--skip_broken_scenes" in first
    assert f"{SECOND} has no colour images" in others[0] and f"{THIRD}/00000.txt" in others[1]
    assert not (damaged / "out" / MANIFEST).exists()


def test_broken_scenes_are_skipped(damaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="2 of 3 scenes cannot be used"):
        prepare(damaged, DEPTH, damaged / "out", skip_broken_scenes=False, quiet=True)
    worked = interrupted(monkeypatch, "none")
    done = prepare(damaged, DEPTH, damaged / "out", quiet=True)
    assert [each.scene_id for each in PreparedSet(done.folder, damaged)] == [SCENE, SCENE]
    assert worked == [SECOND, THIRD], "the scene of the first attempt is kept"
    assert done.manifest["skipped"] == {"broken_scene": 4, "no_visible_frame": 1}
    assert done.manifest["counts"]["scenes"] == 1
    dropped = lines(done.folder)
    assert [each["id"].split("|")[0] for each in dropped] == [SECOND, THIRD, SECOND, THIRD, SCENE]
    assert "has no colour images" in dropped[0]["detail"]
    assert dropped[0]["location"].endswith("train.json: entry 1")


def test_more_than_ten_problems_are_counted(root: Path) -> None:
    write_annotations(root, [{**entry(), "scene_id": f"scene{n:04d}_00"} for n in range(1, 14)])
    with pytest.raises(ValueError, match=r"13 of 13 scenes cannot be used") as caught:
        prepare(root, DEPTH, root / "out", quiet=True)
    assert len(str(caught.value).splitlines()) == 12 and str(caught.value).endswith("... and 29 more")


def test_wrong_annotations_cannot_be_skipped(scenes: Path) -> None:
    write_annotations(scenes, [entry(), entry(98), {**entry(97), "scene_id": SECOND}])
    with pytest.raises(ValueError, match="2 annotations refer to objects that the scenes do not have") as caught:
        prepare(scenes, DEPTH, scenes / "out", quiet=True)
    assert "entry 2: field 'object_id' is 98" in str(caught.value)
    assert "entry 3: field 'object_id' is 97" in str(caught.value)


def test_no_samples_raise(root: Path) -> None:
    write_annotations(root, [entry(97, "floor")])
    with pytest.raises(ValueError, match=r"No samples could be made from .* \(skipped: 1 no_box\)"):
        prepare(root, DEPTH, root / "out", skip_without_box=True, quiet=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "scanqa"}, "--format is vgllm; scanqa has video3dllm"),
        ({"task": "detection", "format": "video3dllm"}, "detection has vgllm"),
        ({"split": "test_w_obj"}, "--splits names 'test_w_obj'; scanrefer has train, val"),
        ({"split": "val_../other"}, "--splits names 'val_../other'"),
        ({"rolls": 0}, "--rolls is 0; it must be at least 1"),
        ({"rolls": 2}, "--rolls is 2, but frames.protocol uniform gives every roll the same frames"),
        ({"windows": -1}, "--windows is -1"),
        ({"frames": FrameOptions("uniform", 0)}, "frames.count is 0"),
    ],
)
def test_invalid_options(root: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepare(root, replace(DEPTH, **change), root / "out", quiet=True)


def test_every_task_is_prepared_from_synthetic_rooms(rooms: Written, tmp_path: Path) -> None:
    frames = FrameOptions("vgllm", 4)
    wanted = [
        TaskOptions("scanrefer", "train", frames=frames, rolls=2),
        TaskOptions("scanrefer", "val", "video3dllm", FrameOptions("coverage", 4)),
        TaskOptions("scan2cap", "train", frames=FrameOptions("scene_sets", 4)),
        TaskOptions("scan2cap", "val", frames=frames),
        TaskOptions("scanqa", "train", "video3dllm", FrameOptions("uniform", 4)),
        TaskOptions("scanqa", "val", "video3dllm", FrameOptions("uniform", 4)),
        TaskOptions("detection", "val", frames=FrameOptions("uniform", 4), step=1, windows=10),
    ]
    for number, options in enumerate(wanted):
        done = prepare(rooms.root, options, tmp_path / str(number), quiet=True)
        made = PreparedSet(done.folder, rooms.root)
        assert len(made) and made.task == options.task
        assert len({each.id for each in made}) == len(made)
        assert not done.manifest["skipped"], options
        for each in made:
            assert len(each.frames) == 4 and all(path.is_file() for path in each.frames)
        if options.split == "val" and options.task in ("scan2cap", "scanqa"):
            assert all(each.references for each in made)


def test_a_missing_file_raises_with_its_name(root: Path) -> None:
    write_questions(root, [question_entry()])
    options = TaskOptions("scanqa", "val", "video3dllm", FrameOptions("uniform", 2))
    with pytest.raises(ValueError, match=r"ScanQA_v1.0_val.json does not exist"):
        prepare(root, options, root / "out", quiet=True)


def test_the_demo_prepares_the_sets_of_its_recipe(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "w2r2_ds")
    for split in ("train", "val"):
        write_annotations(root, [entry(), entry(4, "table")], split)
        write_questions(root, [question_entry()], split)
    config = load_config(DEMO_RECIPE, ["--data.root", str(root), "--demo.frames", "2"])
    config.data.train = [SourceConfig(f"prepared/{task}/train") for task in ("scanrefer", "scan2cap", "scanqa")]
    config.data.val = [SourceConfig("prepared/scanrefer/val"), SourceConfig("prepared/scanqa/val")]
    prepare_sets(config)
    assert caplog.text.count("samples of") == 5
    formats = {name: read_manifest(root / f"prepared/{name}/val")["format"] for name in ("scanrefer", "scanqa")}
    assert formats == {"scanrefer": "video3dllm", "scanqa": "video3dllm"}
    mixture = load_mixture(config.data, "train")
    assert [each.task for each in mixture] == [task for task in ("scanrefer", "scan2cap", "scanqa") for _ in range(2)]
    assert [path.name for path in mixture[0].frames] == ["00000.jpg", "00002.jpg"]
    assert mixture[4].question.endswith(" Answer the question simply.")
    assert mixture[0].box_format == "world" and [each.decimals for each in mixture[:5:2]] == [1, 1, 2]
    caplog.clear()
    prepare_sets(config)
    assert caplog.text == "", "existing sets are reused"
    config.data.val = [SourceConfig("prepared/elsewhere")]
    with pytest.raises(ValueError, match=r"prepared/elsewhere .*prepared/TASK/NAME"):
        prepare_sets(config)
