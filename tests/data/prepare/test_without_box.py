"""`--skip_without_box`: items about objects without a box are skipped, counted and recorded; otherwise an error."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from hand_scene import SCENE, entry, write_annotations, write_scene
from w2r2_ds.commands.prepare import main
from w2r2_ds.data.frames.selection import FrameOptions
from w2r2_ds.data.prepare import pipeline as preparing
from w2r2_ds.data.prepare.manifest import summary_line
from w2r2_ds.data.prepare.pipeline import SKIPPED_FILE, prepare
from w2r2_ds.data.prepared_set import PreparedSet
from w2r2_ds.data.tasks.base import TaskOptions
from w2r2_ds.utils.files.file_lock import locked

SECOND = "scene0001_00"
TWO = FrameOptions("uniform", 2)
DEPTH = TaskOptions("scanrefer", "train", frames=TWO, visibility="depth")
CAPTIONS = TaskOptions("scan2cap", "val", frames=TWO, boxes="annotated")


@pytest.fixture
def scenes(root: Path) -> Path:
    """Two scenes; one description of the first and both of the second refer to objects without a box."""
    write_scene(root, SECOND)
    walls = [{**entry(98, "wall", number), "scene_id": SECOND} for number in (3, 4)]
    write_annotations(root, [entry(), entry(97, "floor", 1), entry(4, "table", 2), *walls])
    write_annotations(root, [entry(), entry(97, "floor", 1), entry(97, "floor", 2), entry(4, "table")], "val")
    return root


def dropped(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / SKIPPED_FILE).read_text().splitlines()]


@pytest.mark.parametrize(
    ("options", "kept", "skipped"),
    [
        (
            DEPTH,
            [f"{SCENE}|0|office_chair|0", f"{SCENE}|4|table|2"],
            [(f"{SCENE}|97|floor|1", 2), (f"{SECOND}|98|wall|3", 4), (f"{SECOND}|98|wall|4", 5)],
        ),
        (CAPTIONS, [f"{SCENE}|0|office_chair", f"{SCENE}|4|table"], [(f"{SCENE}|97|floor", 2)]),
    ],
    ids=["scanrefer", "scan2cap"],
)
def test_items_are_skipped_counted_and_recorded(
    scenes: Path, options: TaskOptions, kept: list[str], skipped: list[tuple[str, int]]
) -> None:
    done = prepare(scenes, options, scenes / "out", skip_without_box=True, quiet=True)
    assert [each.id for each in PreparedSet(done.folder, scenes)] == kept
    assert done.manifest["skipped"] == {"no_box": len(skipped)}
    assert done.manifest["options"]["skip_without_box"] is True
    records = dropped(done.folder)
    assert [each["id"] for each in records] == [name for name, _ in skipped]
    for each, (name, number) in zip(records, skipped, strict=True):
        assert each["location"].endswith(f"entry {number}") and each["reason"] == "no_box"
        assert each["detail"] == f"its object has no box in {name.split('|')[0]}_aligned_bbox.npy"
    assert f"{len(skipped)} no_box" in summary_line(done.folder, done.manifest, False)


@pytest.mark.parametrize("options", [DEPTH, CAPTIONS], ids=lambda each: each.task)
def test_the_error_names_the_option(scenes: Path, options: TaskOptions) -> None:
    with pytest.raises(ValueError, match="--skip_without_box"):
        prepare(scenes, options, scenes / "out", quiet=True)
    assert not (scenes / "out" / "manifest.json").exists()


def test_unique_and_multiple_use_all_annotations(scenes: Path) -> None:
    """One of two chairs has no box: the other stays "multiple", as in ScanRefer."""
    write_annotations(scenes, [entry(), entry(97, "office_chair", 1)])
    done = prepare(scenes, DEPTH, scenes / "out", skip_without_box=True, quiet=True)
    (made,) = PreparedSet(done.folder, scenes)
    assert made.target.group == "multiple"


def test_shards_are_not_reused_with_another_skip_without_box(scenes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rejected preparation keeps finished scenes; a scene with skipped items is not reused without the option."""
    worked, real = [], preparing.prepare_scene

    def outcomes(root: Path, options: TaskOptions, job: Any, **rest: Any) -> Any:
        worked.append(job.scene_id)
        return real(root, options, job, **rest)

    monkeypatch.setattr(preparing, "prepare_scene", outcomes)
    write_annotations(scenes, [entry(), {**entry(98, "wall", 3), "scene_id": SECOND}])
    for _ in range(2):
        with pytest.raises(ValueError, match="1 annotations refer to objects"):
            prepare(scenes, DEPTH, scenes / "out", quiet=True)
    assert worked == [SCENE, SECOND, SECOND], "the scene without errors is kept"
    monkeypatch.setattr(preparing, "_finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        prepare(scenes, DEPTH, scenes / "out", skip_without_box=True, quiet=True)
    with pytest.raises(ValueError, match="1 annotations refer to objects"):
        prepare(scenes, DEPTH, scenes / "out", quiet=True)
    assert worked[3:] == [SECOND, SECOND], "a scene with skipped items is prepared again without the option"
    monkeypatch.undo()
    done = prepare(scenes, DEPTH, scenes / "out", skip_without_box=True, quiet=True)
    assert prepare(scenes, DEPTH, done.folder, skip_without_box=True, quiet=True).reused
    with pytest.raises(ValueError, match=r"another prepared data set \(options: skip_without_box is True there"):
        prepare(scenes, DEPTH, done.folder, quiet=True)


def test_the_command_has_the_option(
    scenes: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["scan2cap", "--root", str(scenes), "--splits", "[val]", "--boxes", "annotated", "--skip-without-box"]
    monkeypatch.setattr(sys, "argv", ["prepare.py", *words])
    assert main() == 0
    assert "1 no_box" in capsys.readouterr().out


def test_a_second_preparation_of_the_same_folder_raises(scenes: Path) -> None:
    """The second one is an error and writes nothing."""
    with locked(scenes / "out.lock", "first", "wait"):
        with pytest.raises(ValueError, match=r"out is being prepared by process \d+ on .*, or pass another --out"):
            prepare(scenes, CAPTIONS, scenes / "out", skip_without_box=True, quiet=True)
        assert not (scenes / "out").exists()
    done = prepare(scenes, CAPTIONS, scenes / "out", skip_without_box=True, quiet=True)
    with locked(scenes / "out.lock", "first", "wait"):
        assert prepare(scenes, CAPTIONS, done.folder, skip_without_box=True, quiet=True).reused, "reading needs no lock"
    assert not (scenes / "out.lock").exists()
