"""Pictures of validation samples: which samples, and the boxes in their frames."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from w2r2_ds.boxes3d.transforms import world_to_camera
from w2r2_ds.data.sources.scannet import alignment_file
from w2r2_ds.data.tasks.scanrefer import answer_text
from w2r2_ds.evaluation.predictions.record import record_of
from w2r2_ds.evaluation.sample_pictures import COLORS, SAMPLES, WIDTH, draw_samples, drawable_samples
from w2r2_ds.types.sample import Sample

BOX = np.array([0.0, 0.0, 2.0, 0.8, 0.6, 0.4, 0.0, 0.0, 0.0])
INTRINSIC = np.diag([80.0, 80.0, 1.0, 1.0])
INTRINSIC[:2, 2] = 40, 30


@pytest.fixture(scope="module")
def posed(samples: list[Any], tmp_path_factory: pytest.TempPathFactory) -> Sample:
    """A sample with black frames, a camera at the origin, and a box in front of it."""
    folder = tmp_path_factory.mktemp("scene")
    frames = tuple(folder / f"{index:05}.jpg" for index in range(2))
    for path in frames:
        Image.new("RGB", (80, 60)).save(path)
    np.savetxt(folder / "intrinsic.txt", INTRINSIC)
    poses = np.stack([np.eye(4)] * 2)
    target = replace(samples[0].target, box=BOX)
    answer = answer_text(0, world_to_camera(BOX, poses[0]))
    return replace(samples[0], frames=frames, cam_to_world=poses, target=target, answer=answer)


def pixels(sample: Sample, text: str) -> np.ndarray:
    return np.asarray(draw_samples([sample], [record_of(sample, text)], "step 3"))


def count(image: np.ndarray, name: str) -> int:
    """Pixels of a box, without those of the legend."""
    return int((image[24:] == np.array(COLORS[name])).all(-1).sum())


def test_both_boxes_are_drawn(posed: Sample) -> None:
    nothing = pixels(posed, "I cannot find it.")
    assert nothing.shape == (24 + 22 + 240 + 6, 3 * WIDTH + 12, 3)
    assert count(nothing, "true") > 1000 and count(nothing, "predicted") == 0
    # The predicted box is drawn over the true one.
    right = pixels(posed, posed.answer)
    assert count(right, "predicted") == count(nothing, "true") and count(right, "true") == 0
    beside = pixels(posed, answer_text(0, BOX + np.array([0.5, *[0.0] * 8])))
    assert count(beside, "predicted") > 1000 and count(beside, "true") > 500


def test_edges_are_where_the_camera_projects_them(posed: Sample) -> None:
    """The front face, 1.8 m away: 40 -+ 80 * 0.4 / 1.8 = 22.2 and 57.8 pixels; frames are drawn 4 times as large."""
    image = pixels(posed, "no")[24 + 22 :, :WIDTH]
    columns = np.flatnonzero((image == np.array(COLORS["true"])).all(-1).any(0))
    assert columns.min() == pytest.approx((22.2 + 0.5) * 4, abs=2)
    assert columns.max() == pytest.approx((57.8 + 0.5) * 4, abs=2)


def test_the_first_samples_with_boxes(posed: Sample, caption_sample: Any, answer_sample: Any) -> None:
    grounding = [replace(posed, id=str(index)) for index in range(SAMPLES + 2)]
    assert drawable_samples([caption_sample, answer_sample, *grounding]) == [2, 3, 4, 5]
    with pytest.raises(ValueError, match=r"train\.samples_every.*data\.val"):
        drawable_samples([caption_sample])


def test_poses_are_read_from_the_scene(posed: Sample, tmp_path: Path) -> None:
    """Sets with world boxes are prepared without poses."""
    unposed = []
    for name in ("without", "with"):
        folder = tmp_path / "posed_images" / name
        shutil.copytree(posed.frames[0].parent, folder)
        description = alignment_file(tmp_path, name)
        description.parent.mkdir(parents=True)
        description.touch()
        frames = tuple(folder / path.name for path in posed.frames)
        unposed.append(replace(posed, frames=frames, cam_to_world=np.full((2, 4, 4), np.nan)))
    for path in unposed[1].frames:
        np.savetxt(path.with_suffix(".txt"), np.eye(4))
    with pytest.raises(ValueError, match=rf"train\.samples_every: .*{unposed[0].frames[0].parent}"):
        drawable_samples(unposed[:1])
    assert drawable_samples(unposed[1:]) == [0]
    picture = np.asarray(draw_samples(unposed[1:], [record_of(posed, posed.answer)], "step 3"))
    np.testing.assert_array_equal(picture, pixels(posed, posed.answer))


def test_a_scene_without_intrinsics_is_an_error_at_the_start(posed: Sample, tmp_path: Path) -> None:
    frames = tuple(tmp_path / path.name for path in posed.frames)
    with pytest.raises(ValueError, match=rf"train\.samples_every: .*{tmp_path}"):
        drawable_samples([replace(posed, frames=frames)])
