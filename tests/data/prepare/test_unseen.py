"""Items that no frame shows: counted in the summary, explained if they are many, an error if they are all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hand_scene import ALIGN, SCENE, entry, write_annotations, write_infos
from w2r2_ds.data.frames.selection import FrameOptions
from w2r2_ds.data.prepare.manifest import summary_line
from w2r2_ds.data.prepare.pipeline import prepare
from w2r2_ds.data.prepare.unseen import HIGH_SHARE
from w2r2_ds.data.tasks.base import TaskOptions

TWO = FrameOptions("uniform", 2)
DEPTH = TaskOptions("scanrefer", "val", frames=TWO, visibility="depth")
INFOS = TaskOptions("scanrefer", "val", frames=FrameOptions("uniform", 3))
HIDDEN = entry(3, "lamp", text="behind the wall.")
"""A description of an object that no frame shows."""


def images(root: Path) -> Path:
    return root / "posed_images" / SCENE


def centimetres(root: Path) -> None:
    for path in images(root).glob("*.png"):
        Image.fromarray((np.array(Image.open(path)) // 10).astype(np.uint16)).save(path)


def millimetres(root: Path) -> None:
    for path in images(root).glob("*.png"):
        Image.fromarray((np.array(Image.open(path)) * 10).astype(np.uint16)).save(path)


def inverted_poses(root: Path) -> None:
    for path in images(root).glob("0*.txt"):
        pose = np.loadtxt(path)
        if np.isfinite(pose).all():
            np.savetxt(path, np.linalg.inv(pose))


def aligned_poses(root: Path) -> None:
    for path in images(root).glob("0*.txt"):
        pose = np.loadtxt(path)
        if np.isfinite(pose).all():
            np.savetxt(path, ALIGN @ pose)


@pytest.fixture
def described(root: Path) -> Path:
    """Two visible objects and a hidden one, in both splits."""
    for split in ("train", "val"):
        write_annotations(root, [entry(), entry(4, "table"), HIDDEN], split)
        write_infos(root, split)
    return root


def summary(root: Path, options: TaskOptions, out: str = "out") -> str:
    done = prepare(root, options, root / out, quiet=True)
    return summary_line(done.folder, done.manifest, done.reused)


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("options", [DEPTH, INFOS], ids=lambda options: options.visibility)
def test_the_summary_counts_unseen_items(described: Path, options: TaskOptions, split: str) -> None:
    text = summary(described, replace(options, split=split))
    assert "1 of 3 items are seen by no frame" in text and "warning" not in text


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("damage", [centimetres, inverted_poses, aligned_poses])
def test_all_unseen_is_an_error_with_likely_causes(described: Path, damage: Callable[[Path], None], split: str) -> None:
    damage(described)
    options = replace(DEPTH, split=split)
    with pytest.raises(ValueError, match=rf"ScanRefer_filtered_{split}\.json: all 3 .*") as caught:
        prepare(described, options, described / "out", quiet=True)
    for cause in ("millimetres", "camera-to-world", "axisAlignment", "depth_intrinsic.txt"):
        assert cause in str(caught.value)
    assert not (described / "out" / "manifest.json").exists()


def test_corrected_depth_images_are_read_again(described: Path) -> None:
    """The contents of images are in no hash: the scenes of the failed preparation must not be reused."""
    centimetres(described)
    with pytest.raises(ValueError, match="millimetres"):
        prepare(described, DEPTH, described / "out", quiet=True)
    millimetres(described)
    assert "1 of 3 items are seen by no frame" in summary(described, DEPTH)


def test_a_high_share_is_a_warning(described: Path) -> None:
    others = [{**HIDDEN, "ann_id": str(number)} for number in range(1, 4)]
    write_annotations(described, [entry(), entry(4, "table"), HIDDEN, *others], "val")
    text = summary(described, DEPTH)
    assert HIGH_SHARE < 4 / 6 and "warning: 4 of 6 items are seen by no frame" in text
    assert "millimetres" in text and "camera-to-world" in text
    assert "warning: 4 of 6" in summary(described, DEPTH), "also if the folder is reused"


def test_objects_without_an_instance_are_unseen(described: Path) -> None:
    write_annotations(described, [HIDDEN], "train")
    write_annotations(described, [HIDDEN], "val")
    for split in ("train", "val"):
        with pytest.raises(ValueError, match=r"all 1 items .*EmbodiedScan's scans"):
            prepare(described, replace(INFOS, split=split), described / split, quiet=True)


def test_windows_without_objects(described: Path) -> None:
    options = TaskOptions("detection", "train", frames=FrameOptions("uniform", 1), interval=1, step=1)
    assert "1 of 3 items are seen by no frame" in summary(described, options), "frame 2 is turned away"


def test_tasks_that_do_not_depend_on_visibility_count_nothing(described: Path) -> None:
    text = summary(described, TaskOptions("scan2cap", "val", frames=TWO, boxes="annotated"))
    assert "seen by no frame" not in text
