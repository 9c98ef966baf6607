"""`w2r2 prepare` with --check and --dry_run finds what the preparation finds; and the command `boxes`."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trimesh
from PIL import Image
from rich.console import Console

from hand_scene import ALIGN, SCENE, entry, write_annotations, write_infos, write_proposals
from preparations import SECOND, THIRD
from w2r2_ds.commands.prepare import main, with_values
from w2r2_ds.data.frames.selection import FrameOptions
from w2r2_ds.data.prepare.pipeline import prepare
from w2r2_ds.data.prepare.scannet_boxes import BoxesSummary, write_all_boxes
from w2r2_ds.data.prepare.trial import try_preparation
from w2r2_ds.data.prepared_set import PreparedSet
from w2r2_ds.data.sources.frames import LOST_POSE
from w2r2_ds.data.sources.scannet import boxes_file, load_scene
from w2r2_ds.data.tasks.base import TaskOptions
from w2r2_ds.utils.findings import by_kind
from w2r2_ds.utils.progress import progress

REFER = TaskOptions("scanrefer", "train", frames=FrameOptions("uniform", 2))
DEPTH = TaskOptions("scanrefer", "train", frames=FrameOptions("uniform", 2), visibility="depth")


def problems(root: Path, options: TaskOptions = REFER) -> tuple[str, ...]:
    """One line per kind of problem."""
    return try_preparation(root, options, quiet=True).problems


@pytest.fixture
def complete(root: Path) -> Path:
    write_annotations(root, [entry()])
    write_infos(root)
    return root


def test_complete_inputs_have_no_problems(complete: Path) -> None:
    trial = try_preparation(complete, REFER, quiet=True)
    assert trial.problems == () and (trial.samples, trial.frames) == (1, 2)
    head, lost = trial.report().splitlines()
    assert head == "scanrefer train: everything is here"
    assert LOST_POSE in lost and "00003.txt" in lost


def test_every_problem_of_a_scene_is_listed(complete: Path) -> None:
    images = complete / "posed_images" / SCENE
    (images / "intrinsic.txt").unlink()
    (images / "00000.txt").write_text("1 0 0")
    boxes = complete / "scannet_data" / f"{SCENE}_aligned_bbox.npy"
    boxes.write_bytes(boxes.read_bytes()[:90])
    (complete / "scans" / SCENE / f"{SCENE}.txt").write_text("colorWidth = 64\n")
    found = problems(complete)
    for file in (f"{SCENE}.txt", "00000.txt", "intrinsic.txt", boxes.name):
        assert sum(f"/{file}" in line for line in found) == 1
    assert len(found) == 4
    with pytest.raises(ValueError) as caught:
        prepare(complete, REFER, complete / "out", quiet=True)
    assert set(found) == {line.strip() for line in str(caught.value).splitlines()[1:]}


def test_an_empty_root_lists_all_sources(tmp_path: Path) -> None:
    """Without any file, the scenes are unknown."""
    *files, scenes = problems(tmp_path)
    for name, source in (
        ("ScanRefer/ScanRefer_filtered_train.json", "daveredrum/ScanRefer"),
        ("scannetv2-labels.combined.tsv", "http://www.scan-net.org"),
        ("embodiedscan/embodiedscan_infos_train.pkl", "OpenRobotLab/EmbodiedScan"),
    ):
        assert sum(line.startswith(f"{tmp_path / name} does not exist") and source in line for line in files) == 1
    assert len(files) == 3 and str(tmp_path / "posed_images") in scenes


def test_one_line_per_kind_with_a_count(complete: Path) -> None:
    """A hundred scenes that are not there are one line; so are those that the infos lack."""
    write_annotations(complete, [entry(), *({**entry(), "scene_id": f"scene{n:04d}_00"} for n in range(1, 101))])
    trial = try_preparation(complete, REFER, quiet=True)
    (missing,) = trial.broken_scenes
    assert trial.problems == () and missing in trial.report()
    assert "infos do not have this scene" in missing and "scene0001_00" in missing and "99 more" in missing
    kinds = try_preparation(complete, DEPTH, quiet=True).broken_scenes
    assert len(kinds) == 3 and all("scene0001_00" in line and "99 more" in line for line in kinds)


def test_extracted_scenes_are_read_without_the_annotations(complete: Path) -> None:
    (complete / "scannetv2-labels.combined.tsv").unlink()
    (complete / "posed_images" / SCENE / "00001.txt").write_text("x")
    labels, pose = problems(complete)
    assert "scannetv2-labels.combined.tsv does not exist" in labels and "00001.txt" in pose


def test_a_file_that_cannot_be_read_is_a_problem(complete: Path) -> None:
    file = complete / "embodiedscan" / "embodiedscan_infos_train.pkl"
    file.write_bytes(file.read_bytes()[:200])
    (line,) = problems(complete)
    assert str(file) in line and "truncated" in line


def test_required_files_of_each_task(complete: Path) -> None:
    write_annotations(complete, [entry()], "val")
    frames = FrameOptions("uniform", 2)

    def missing(*options: Any, **others: Any) -> list[str]:
        lines = problems(complete, TaskOptions(*options, frames=frames, **others))
        return [line.removeprefix(f"{complete}/").split(" ")[0] for line in lines]

    assert missing("scan2cap", "val") == ["proposals/scannet_val_pred_box.json"]
    assert missing("scan2cap", "val", boxes="annotated") == []
    write_proposals(complete, [[0, 0, 0, 1, 1, 1]])
    assert missing("scan2cap", "val") == []
    assert missing("scanqa", "val", "video3dllm") == ["ScanQA/ScanQA_v1.0_val.json"]
    assert missing("scanrefer", "val") == ["embodiedscan/embodiedscan_infos_val.pkl"]
    assert missing("scanrefer", "val", visibility="depth") == []


def damage(path: Path, how: str) -> None:
    """Change an image in a way that a phone, a converter or an interrupted copy does."""
    match how:
        case "webp":
            Image.open(path).save(path, format="WEBP")
        case "trailing":
            path.write_bytes(path.read_bytes() + b"\0\0\0\x18ftypmp42" + bytes(5000))
        case "truncated":
            path.write_bytes(path.read_bytes()[:-40])
        case "depth":
            Image.fromarray(np.ones((48, 64), np.uint16)).save(path, format="PNG")


@pytest.mark.parametrize(("how", "is_lost"), [("webp", 0), ("trailing", 0), ("truncated", 1), ("depth", 1)])
def test_check_and_preparation_accept_the_same_images(complete: Path, how: str, is_lost: int) -> None:
    damage(complete / "posed_images" / SCENE / "00001.jpg", how)
    trial = try_preparation(complete, DEPTH, quiet=True)
    done = prepare(complete, DEPTH, complete / "out", quiet=True)
    assert trial.problems == () and trial.samples == done.manifest["counts"]["samples"] == 1
    assert list(trial.skipped_inputs) == done.manifest["skipped_inputs"]
    assert sum("cannot be read" in line and "00001.jpg" in line for line in trial.skipped_inputs) == is_lost


@pytest.mark.parametrize("name", ["00001.png", "00001.pgm"])
def test_a_truncated_depth_image_is_a_lost_frame(complete: Path, name: str) -> None:
    folder = complete / "posed_images" / SCENE
    depth = Image.open(folder / "00001.png")
    depth.load()
    (folder / "00001.png").unlink()
    depth.save(folder / name)
    whole = try_preparation(complete, DEPTH, quiet=True)
    assert not any("depth image" in line for line in whole.skipped_inputs)
    damage(folder / name, "truncated")
    trial = try_preparation(complete, DEPTH, quiet=True)
    done = prepare(complete, DEPTH, complete / "out", quiet=True)
    assert trial.problems == () and trial.samples == done.manifest["counts"]["samples"] == 1
    assert any("depth image cannot be read" in line and name in line for line in done.manifest["skipped_inputs"])


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("scans/{0}/{0}.txt", b"colorWidth = 64"),
        ("posed_images/{0}/00001.txt", b"1 0 0"),
        ("posed_images/{0}/intrinsic.txt", b"1 0 0"),
        ("posed_images/{0}/depth_intrinsic.txt", b""),
        ("scannet_data/{0}_aligned_bbox.npy", b"\x93NUMPY"),
        ("ScanRefer/ScanRefer_filtered_train.json", b"[]"),
    ],
)
def test_check_and_preparation_find_the_same_errors(complete: Path, file: str, content: bytes) -> None:
    path = complete / file.format(SCENE)
    path.write_bytes(content)
    trial = try_preparation(complete, DEPTH, quiet=True)
    with pytest.raises(ValueError, match=re.escape(trial.problems[0])):
        prepare(complete, DEPTH, complete / "out", quiet=True)
    assert path.name in trial.problems[0]


def test_a_forecast_has_the_numbers_of_the_preparation_and_writes_nothing(complete: Path) -> None:
    before = sorted(complete.rglob("*"))
    options = TaskOptions("scanrefer", "train", frames=FrameOptions("vgllm", 2), rolls=2)
    trial = try_preparation(complete, options, quiet=True)
    assert sorted(complete.rglob("*")) == before
    counts = prepare(complete, options, complete / "out", quiet=True).manifest["counts"]
    text = trial.forecast(complete / "out")
    assert f"{counts['samples']} samples of 1 descriptions (36665 are published), 1 scenes, " in text and "MB" in text


def test_check_and_preparation_find_that_no_frame_shows_an_object(complete: Path) -> None:
    write_annotations(complete, [entry(3, "lamp")])  # it is behind the wall
    (problem,) = try_preparation(complete, DEPTH, quiet=True).problems
    with pytest.raises(ValueError, match=re.escape(problem)):
        prepare(complete, DEPTH, complete / "out", quiet=True)


def test_broken_scenes_are_problems_unless_they_are_skipped(damaged: Path) -> None:
    trial = try_preparation(damaged, DEPTH, skip_broken_scenes=False, quiet=True)
    assert [line.count(SECOND) + 2 * line.count(THIRD) for line in trial.problems] == [1, 2]
    trial = try_preparation(damaged, DEPTH, quiet=True)
    assert trial.problems == () and len(trial.broken_scenes) == 2 and trial.samples == 2


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
    assert run(monkeypatch, *options, "--dry-run", "--workers", "1") == 0
    assert "2 samples of 1 descriptions" in capsys.readouterr().out
    assert run(monkeypatch, *options, "--check", "--workers", "1") == 0
    run(monkeypatch, *options, "--workers", "1")
    assert "2 samples of 1 descriptions in 1 scenes" in capsys.readouterr().out
    made = PreparedSet(complete / "prepared" / "scanrefer" / "train", complete)
    assert [each.id.split("#")[1] for each in made] == ["0", "1"], "VG-LLM's two rolls are the default"
    (complete / "posed_images" / SCENE / "00001.txt").write_text("x")
    for flag in ("--check", "--dry-run"):
        assert run(monkeypatch, *options, flag, "--workers", "1") == 1
        assert "00001.txt" in capsys.readouterr().out
    assert run(monkeypatch, *options, "--format", "video3dllm", "--box_angles", "nearest_heading") == 1
    assert "--box_angles is nearest_heading, but boxes of format video3dllm" in capsys.readouterr().err
    for decimals, form in (("3", "video3dllm"), ("1", "vgllm")):
        assert run(monkeypatch, *options, "--format", form, "--decimals", decimals) == 1
        assert f"--decimals is {decimals}" in capsys.readouterr().err
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


@pytest.mark.parametrize("kind", ["folder", "description"])
def test_a_broken_scan_does_not_block_the_boxes_of_the_others(root: Path, kind: str) -> None:
    write_mesh(root, SCENE)
    if kind == "folder":
        for name in (".cache", "scene0001_00 (copy)"):
            (root / "scans" / name).mkdir()
        done = write_all_boxes(root, overwrite=True)
        assert done.written == 1
        (line,) = by_kind(done.findings)
        assert line.startswith("2 folders in scans/") and line.endswith(".cache")
        with pytest.raises(ValueError, match=r"'\.cache' is not made of"):
            write_all_boxes(root, [".cache"])
        return
    boxes_file(root, SCENE).unlink()
    (root / "scans" / "scene0001_00").mkdir()
    (root / "scans" / "scene0001_00" / "scene0001_00.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"1 of 2 scenes have no boxes yet:\n.*scene0001_00"):
        write_all_boxes(root)
    assert boxes_file(root, SCENE).is_file()


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
