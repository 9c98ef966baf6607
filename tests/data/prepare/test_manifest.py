"""Manifest: comparison with published counts, reuse of equal data sets, changed and unreadable inputs."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from hand_scene import SCENE
from preparations import DEPTH, SECOND, contents
from w2r2_ds.data.frames.selection import FrameOptions
from w2r2_ds.data.prepare import manifest
from w2r2_ds.data.prepare.manifest import summary_line
from w2r2_ds.data.prepare.pipeline import prepare
from w2r2_ds.data.prepared_set import PreparedSet
from w2r2_ds.data.tasks.scanrefer import ScanRefer
from w2r2_ds.utils.files.hashing import file_sha256


def test_the_summary_compares_with_the_published_count(scenes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = prepare(scenes, DEPTH, scenes / "one", quiet=True)
    assert "7 descriptions, not the 36665 that are published" in summary_line(done.folder, done.manifest, False)
    monkeypatch.setattr(ScanRefer, "published", {"train": 7})
    done = prepare(scenes, DEPTH, scenes / "two", quiet=True)
    assert done.manifest["counts"]["published"]["met"] is True
    text = summary_line(done.folder, done.manifest, False)
    assert "7 descriptions, as published" in text and "1 no_visible_frame" in text


def test_published_scenes_are_compared_with_all_annotated_scenes(
    damaged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ScanRefer, "published", {"train": 7})
    monkeypatch.setattr(ScanRefer, "unit", lambda self, options: "scenes")
    done = prepare(damaged, DEPTH, damaged / "out", quiet=True)
    assert done.manifest["counts"]["scenes"] == 1
    assert "7 scenes, as published" in summary_line(done.folder, done.manifest, False)


def test_an_equal_data_set_is_reused_and_another_one_rejected(scenes: Path) -> None:
    out = scenes / "out"
    assert not prepare(scenes, DEPTH, out, quiet=True).reused
    before = contents(out)
    assert prepare(scenes, DEPTH, out, quiet=True).reused
    more = replace(DEPTH, frames=FrameOptions("uniform", 3))
    with pytest.raises(ValueError, match=r"out holds another prepared data set \(options: frames: count is 2 there"):
        prepare(scenes, more, out, quiet=True)
    (scenes / "posed_images" / SECOND / "00004.jpg").write_bytes(b"")
    with pytest.raises(
        ValueError,
        match=rf"\(posed_images/{SECOND} has changed since the preparation\); remove it, or pass another --out",
    ):
        prepare(scenes, DEPTH, out, quiet=True)
    assert contents(out) == before


def test_an_edited_task_of_a_plugin_is_another_data_set(scenes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A built-in task has no entry for its code."""
    out = scenes / "out"
    assert "code" not in prepare(scenes, DEPTH, out, quiet=True).manifest
    monkeypatch.setattr(manifest, "source_sha256", lambda task: "a" if task.name == DEPTH.task else None)
    with pytest.raises(ValueError, match=r"out holds another prepared data set \(code is None there and 'a' here"):
        prepare(scenes, DEPTH, out, quiet=True)


def test_a_changed_pose_is_another_data_set(scenes: Path) -> None:
    prepare(scenes, DEPTH, scenes / "out", quiet=True)
    pose = scenes / "posed_images" / SECOND / "00000.txt"
    numbers = pose.read_text().split()
    numbers[3] = str(float(numbers[3]) + 1)  # x of the camera
    pose.write_text(" ".join(numbers))
    with pytest.raises(ValueError, match=rf"posed_images/{SECOND} has changed"):
        prepare(scenes, DEPTH, scenes / "out", quiet=True)


@pytest.mark.parametrize("name", ["pose", "alignment", "prepared"])
def test_an_unreadable_file_is_not_a_missing_file(scenes: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Root can read all files, so that the error is raised by a patched function."""
    done = prepare(scenes, DEPTH, scenes / "out", quiet=True)
    file = {
        "pose": scenes / "posed_images" / SECOND / "00000.txt",
        "alignment": scenes / "scans" / SECOND / f"{SECOND}.txt",
        "prepared": done.folder / f"{SECOND}.parquet",
    }[name]

    def denied(path: Path) -> str:
        if path == file:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return file_sha256(path)

    monkeypatch.setattr(manifest, "file_sha256", denied)
    with pytest.raises(ValueError, match=rf"{re.escape(str(file))} cannot be read \(Permission denied\)"):
        prepare(scenes, DEPTH, scenes / "out", quiet=True)


@pytest.mark.parametrize("name", ["posed_images/{}/00000.txt", "scans/{0}/{0}.txt"])
def test_a_scene_with_an_unreadable_file_can_be_skipped(scenes: Path, name: str) -> None:
    file = scenes / name.format(SECOND)
    file.unlink()
    file.symlink_to(file.name)  # a cycle: ELOOP, which is not a missing file
    with pytest.raises(ValueError, match=re.escape(file.name)):
        prepare(scenes, DEPTH, scenes / "out", skip_broken_scenes=False, quiet=True)
    done = prepare(scenes, DEPTH, scenes / "out", quiet=True)
    assert done.manifest["skipped"]["broken_scene"] > 0
    assert SECOND not in {sample.scene_id for sample in PreparedSet(done.folder, scenes)}
    assert prepare(scenes, DEPTH, scenes / "out", quiet=True).reused


def test_a_scene_whose_folder_cannot_be_listed_can_be_skipped(scenes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, iterdir = scenes / "posed_images" / SECOND, Path.iterdir

    def denied(path: Path) -> Iterator[Path]:
        if path == folder:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return iterdir(path)

    monkeypatch.setattr(Path, "iterdir", denied)
    with pytest.raises(ValueError, match=rf"{re.escape(str(folder))} cannot be read \(Permission denied\)"):
        prepare(scenes, DEPTH, scenes / "out", skip_broken_scenes=False, quiet=True)
    done = prepare(scenes, DEPTH, scenes / "out", quiet=True)
    assert done.manifest["skipped"]["broken_scene"] > 0


def test_other_files_and_changed_files_are_never_overwritten(scenes: Path) -> None:
    out = scenes / "out"
    out.mkdir()
    (out / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match=r"out holds mine\.txt"):
        prepare(scenes, DEPTH, out, quiet=True)
    done = prepare(scenes, DEPTH, scenes / "other", quiet=True)
    (done.folder / f"{SCENE}.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=rf"{SCENE}\.parquet is not the file that manifest.json describes"):
        prepare(scenes, DEPTH, done.folder, quiet=True)
