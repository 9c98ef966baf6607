"""Every task prepares its samples from the files that it needs, and from no others."""

from __future__ import annotations

from pathlib import Path

import pytest

from hand_scene import SCENE, entry, question_entry, write_annotations, write_infos, write_proposals, write_questions
from w2r2_ds.data.frames.selection import FrameOptions
from w2r2_ds.data.prepare.pipeline import prepare
from w2r2_ds.data.prepare.plan import scene_files
from w2r2_ds.data.prepared_set import PreparedSet
from w2r2_ds.data.sources.frames import SceneParts
from w2r2_ds.data.sources.scannet import alignment_file, boxes_file
from w2r2_ds.data.tasks.base import TASKS, TaskOptions, parts_to_read

POSES, INTRINSICS, DEPTH, BOXES = SceneParts.POSES, SceneParts.INTRINSICS, SceneParts.DEPTH, SceneParts.BOXES
UNIFORM, COVERAGE = FrameOptions("uniform", 2), FrameOptions("coverage", 2)
SETS, DRAWN = FrameOptions("scene_sets", 2), FrameOptions("vgllm", 2)

NEEDS = [
    (TaskOptions("scanqa", "val", "video3dllm", UNIFORM), SceneParts.NONE),
    (TaskOptions("scanqa", "train", "video3dllm", SETS), SceneParts.NONE),
    (TaskOptions("scanqa", "val", "video3dllm", COVERAGE), POSES | DEPTH),
    (TaskOptions("scanrefer", "train", "vgllm", DRAWN), POSES | INTRINSICS | BOXES),
    (TaskOptions("scanrefer", "val", "vgllm", UNIFORM, visibility="depth"), POSES | INTRINSICS | BOXES | DEPTH),
    (TaskOptions("scanrefer", "val", "video3dllm", UNIFORM), BOXES),
    (TaskOptions("scanrefer", "train", "video3dllm", SETS), POSES | BOXES),
    (TaskOptions("scanrefer", "train", "video3dllm", SETS, visibility="depth"), POSES | BOXES | DEPTH),
    (TaskOptions("scan2cap", "val", "vgllm", UNIFORM), POSES | BOXES),
    (TaskOptions("scan2cap", "val", "video3dllm", UNIFORM, boxes="annotated"), BOXES),
    (TaskOptions("detection", "train", frames=UNIFORM, interval=1, step=1), POSES),
]


def named(options: TaskOptions) -> str:
    return f"{options.task}-{options.split}-{options.format}-{options.frames.protocol}-{options.visibility}"


def files_of(root: Path, part: SceneParts) -> list[Path]:
    """The files of the scene that belong to a part."""
    images = root / "posed_images" / SCENE
    numbered = {POSES: "[0-9]*.txt", DEPTH: "[0-9]*.png"}
    files = list(images.glob(numbered[part])) if part in numbered else []
    single = {
        POSES: alignment_file(root, SCENE),
        INTRINSICS: images / "intrinsic.txt",
        DEPTH: images / "depth_intrinsic.txt",
        BOXES: boxes_file(root, SCENE),
    }
    return [*files, single[part]]


@pytest.fixture
def complete(root: Path) -> Path:
    for split in ("train", "val"):
        write_annotations(root, [entry()], split)
        write_questions(root, [question_entry()], split)
        write_infos(root, split)
    write_proposals(root, [[0, 0, 0, 1, 1, 1]])
    return root


@pytest.mark.parametrize(("options", "parts"), NEEDS, ids=lambda each: named(each) if hasattr(each, "task") else "")
def test_a_task_needs_the_files_that_it_uses_and_no_others(
    complete: Path, options: TaskOptions, parts: SceneParts
) -> None:
    assert parts_to_read(options) == parts
    for part in SceneParts:
        if part not in parts:
            for path in files_of(complete, part):
                path.unlink()
    done = prepare(complete, options, complete / "out", quiet=True)
    assert len(PreparedSet(done.folder, complete)) > 0
    assert not [name for name in done.manifest["inputs"] if not (complete / name).exists()], "no input is missing"
    for part in parts:
        *numbered, path = files_of(complete, part)
        content = path.read_bytes()
        path.unlink()
        with pytest.raises(ValueError, match=path.name):
            prepare(complete, options, complete / part.name, quiet=True)
        path.write_bytes(content)
        if numbered:  # one of them is missing: its frame is lost
            numbered[0].rename(complete / "moved")
            lost = prepare(complete, options, complete / part.name, quiet=True).manifest["skipped_inputs"]
            assert sum("frames without a " in line for line in lost) == 1
            (complete / "moved").rename(numbered[0])


def test_every_task_is_covered() -> None:
    assert {options.task for options, _ in NEEDS} == {name for name, task in TASKS.items() if is_built_in(task)}


def is_built_in(task: object) -> bool:
    return type(task).__module__.startswith("w2r2_ds.")


def test_the_listed_files_are_those_of_the_parts(complete: Path) -> None:
    options = TaskOptions("scanrefer", "val", "video3dllm", UNIFORM)
    assert scene_files(complete, SCENE, options) == [boxes_file(complete, SCENE)]
