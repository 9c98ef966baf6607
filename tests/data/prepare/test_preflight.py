"""Output of `w2r2 prepare` with --check and --dry_run."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import trimesh
from rich.console import Console

from hand_scene import ALIGN, SCENE, entry, write_annotations, write_infos, write_proposals
from w2r2_ds.commands.prepare import main, with_values
from w2r2_ds.data.frames.selection import FrameOptions
from w2r2_ds.data.prepare.plan import make_plan
from w2r2_ds.data.prepare.preflight import forecast, missing, report
from w2r2_ds.data.prepare.scannet_boxes import BoxesSummary, write_all_boxes
from w2r2_ds.data.prepared_set import PreparedSet
from w2r2_ds.data.sources.scannet import load_scene
from w2r2_ds.data.tasks.base import TaskOptions
from w2r2_ds.utils.progress import progress

REFER = TaskOptions("scanrefer", "train", frames=FrameOptions("uniform", 2))


def found(root: Path, options: TaskOptions = REFER) -> dict[str, str]:
    """Path below the root -> problem."""
    return {each.path.relative_to(root).as_posix(): each.problem for each in missing(root, options)}


@pytest.fixture
def complete(root: Path) -> Path:
    write_annotations(root, [entry()])
    write_infos(root)
    return root


def test_complete_inputs_have_no_missing_files(complete: Path) -> None:
    assert missing(complete, REFER) == []
    assert report(complete, REFER, []) == "scanrefer train: everything is here"


def test_every_missing_and_truncated_file_is_listed(complete: Path) -> None:
    images = complete / "posed_images" / SCENE
    (images / "00002.txt").unlink()
    (images / "intrinsic.txt").unlink()
    (images / "00000.jpg").write_bytes((images / "00000.jpg").read_bytes()[:-30])
    for unused in ("00001.png", "depth_intrinsic.txt"):
        (images / unused).unlink()
    (complete / "scannet_data" / f"{SCENE}_aligned_bbox.npy").unlink()
    expected = {f"posed_images/{SCENE}/{name}": "missing" for name in ("00002.txt", "intrinsic.txt")}
    expected[f"posed_images/{SCENE}/00000.jpg"] = "truncated, or no image"
    expected[f"scannet_data/{SCENE}_aligned_bbox.npy"] = "missing"
    assert found(complete) == expected
    text = report(complete, REFER, missing(complete, REFER))
    assert text.startswith("scanrefer train: 4 files or folders")
    assert "from launchers/prepare.py boxes, or ScanRefer's" in text and "http://www.scan-net.org" in text


def test_an_empty_root_lists_all_sources(tmp_path: Path) -> None:
    """Without any file, the folders that every scene needs are listed, because the scenes are unknown."""
    listed = found(tmp_path)
    files = {"ScanRefer/ScanRefer_filtered_train.json", "scannetv2-labels.combined.tsv"}
    assert set(listed) == files | {
        "embodiedscan/embodiedscan_infos_train.pkl",
        *("posed_images", "scans", "scannet_data"),
    }
    assert listed["posed_images"] == "missing; which scenes are needed is not known before the annotations are here"


def test_missing_files_and_scenes_are_listed(complete: Path) -> None:
    write_annotations(complete, [entry(), {**entry(), "scene_id": "scene0007_00"}])
    assert found(complete) == {
        "embodiedscan/embodiedscan_infos_train.pkl": "does not have scene0007_00",
        "posed_images/scene0007_00": "missing",
        "scans/scene0007_00/scene0007_00.txt": "missing",
        "scannet_data/scene0007_00_aligned_bbox.npy": "missing",
    }
    (complete / "embodiedscan" / "embodiedscan_infos_train.pkl").unlink()
    (complete / "scannetv2-labels.combined.tsv").unlink()
    (complete / "posed_images" / SCENE / "00001.jpg").unlink()
    expected = dict.fromkeys(
        (
            "scannetv2-labels.combined.tsv",
            "embodiedscan/embodiedscan_infos_train.pkl",
            f"posed_images/{SCENE}/00001.jpg",  # without all files, the extracted scenes are checked
        ),
        "missing",
    )
    assert found(complete) == expected


def test_a_file_that_cannot_be_read_is_listed_under_its_source(complete: Path) -> None:
    file = complete / "embodiedscan" / "embodiedscan_infos_train.pkl"
    file.write_bytes(file.read_bytes()[:200])
    (each,) = missing(complete, REFER)
    assert each.path == file and "truncated" in each.problem and each.origin.startswith("EmbodiedScan: fill in")


def test_required_files_of_each_task(complete: Path) -> None:
    write_annotations(complete, [entry()], "val")
    frames = FrameOptions("uniform", 2)
    assert found(complete, TaskOptions("scan2cap", "val", frames=frames)) == {
        "proposals/scannet_val_pred_box.json": "missing"
    }
    assert found(complete, TaskOptions("scan2cap", "val", frames=frames, boxes="annotated")) == {}
    write_proposals(complete, [[0, 0, 0, 1, 1, 1]])
    assert found(complete, TaskOptions("scan2cap", "val", frames=frames)) == {}
    assert found(complete, TaskOptions("scanqa", "val", "video3dllm", frames)) == {
        "ScanQA/ScanQA_v1.0_val.json": "missing"
    }
    assert found(complete, TaskOptions("scanrefer", "val", frames=frames)) == {
        "embodiedscan/embodiedscan_infos_val.pkl": "missing"
    }
    assert found(complete, TaskOptions("scanrefer", "val", frames=frames, visibility="depth")) == {}


def test_a_forecast_writes_nothing(complete: Path) -> None:
    before = sorted(complete.rglob("*"))
    options = TaskOptions("scanrefer", "train", frames=FrameOptions("vgllm", 2), rolls=2)
    text = forecast(make_plan(complete, options), complete / "out")
    assert "at most 2 samples of 1 descriptions (36665 are published), 1 scenes, 4 frames; about 0.0 MB" in text
    assert sorted(complete.rglob("*")) == before


def test_flags_without_a_value() -> None:
    assert with_values(["scanrefer", "--dry_run", "--root", "x"]) == ["scanrefer", "--dry_run", "true", "--root", "x"]
    assert with_values(["--check", "false", "--skip_broken_scenes"]) == [
        "--check",
        "false",
        "--skip_broken_scenes",
        "true",
    ]
    assert with_values(["--out", "a-b", "--frames.count", "-1"]) == ["--out", "a-b", "--frames.count", "-1"]


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["prepare.py", *words])
    return main()


def test_the_command_prepares_checks_and_forecasts(
    complete: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("scanrefer", "--root", str(complete), "--splits", "[train]", "--frames.count", "2")
    assert run(monkeypatch, *options, "--dry-run") == 0
    assert "at most 2 samples" in capsys.readouterr().out
    run(monkeypatch, *options, "--check")
    run(monkeypatch, *options, "--workers", "1")
    assert "2 samples of 1 descriptions in 1 scenes" in capsys.readouterr().out
    made = PreparedSet(complete / "prepared" / "scanrefer" / "train", complete)
    assert [each.id.split("#")[1] for each in made] == ["0", "1"], "VG-LLM's two rolls are the default"
    (complete / "posed_images" / SCENE / "00001.jpg").unlink()
    assert run(monkeypatch, *options, "--check") == 1
    assert run(monkeypatch, *options, "--format", "video3dllm", "--rolls", "2") == 1
    assert "--rolls is 2, but only format vgllm has rolls" in capsys.readouterr().err


def write_mesh(root: Path, scene_id: str) -> None:
    """Write ScanNet's files of a box of 2 x 1 x 0.5: eight corners, one segment, one object."""
    box = trimesh.creation.box((2.0, 1.0, 0.5))
    folder = root / "scans" / scene_id
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{scene_id}_vh_clean_2.ply").write_bytes(box.export(file_type="ply"))
    segments = {"segIndices": [7] * len(box.vertices)}
    (folder / f"{scene_id}_vh_clean_2.0.010000.segs.json").write_text(json.dumps(segments))
    groups = {"segGroups": [{"objectId": 0, "label": "chair", "segments": [7]}]}
    (folder / f"{scene_id}.aggregation.json").write_text(json.dumps(groups))
    words = " ".join(str(value) for value in ALIGN.ravel())
    (folder / f"{scene_id}.txt").write_text(f"axisAlignment = {words}\n")


def test_boxes_of_all_scenes(root: Path) -> None:
    write_mesh(root, SCENE)
    with pytest.raises(ValueError, match=r"1 of 2 scenes have no boxes yet:\n.*scene0001_00"):
        (root / "scans" / "scene0001_00").mkdir()
        write_all_boxes(root)
    (root / "scans" / "scene0001_00").rmdir()
    assert write_all_boxes(root) == BoxesSummary(0, 1, ()), "there already"
    assert len(load_scene(root, SCENE).instances) == 3
    assert write_all_boxes(root, overwrite=True).written == 1
    # turned by 90 degrees and moved by (0.5, -2, 0.25)
    np.testing.assert_allclose(load_scene(root, SCENE).instances[0].box, [0.5, -2.0, 0.25, 1.0, 2.0, 0.5], atol=1e-6)
    with pytest.raises(ValueError, match="holds no scenes; correct --root"):
        write_all_boxes(root / "nowhere")


def test_progress_without_a_terminal_is_printed_in_lines(capsys: pytest.CaptureFixture[str]) -> None:
    for quiet, expected in ((False, "scenes: 3 of 3\n"), (True, "")):
        with progress("scenes", 3, quiet, Console(force_terminal=False)) as advance:
            for _ in range(3):
                advance()
        assert capsys.readouterr().out == expected
    with progress("scenes", 2, console=Console(force_terminal=True, width=80)) as advance:
        advance()
        advance()
    assert "2/2" in capsys.readouterr().out


def test_an_unwritable_folder_is_a_one_line_error(
    complete: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Data are often stored where users may only read."""
    (complete / "taken").write_text("")
    arguments = ["scan2cap", "--root", complete, "--splits", "[train]", "--workers", 1, "--out", complete / "taken"]
    monkeypatch.setattr(sys, "argv", ["prepare.py", *map(str, arguments)])
    assert main() == 1
    assert re.match(r"w2r2 prepare: .*taken", capsys.readouterr().err)
