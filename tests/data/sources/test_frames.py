"""Frames of a scene: names of several extractors, lost frames, and checks of poses, intrinsics and image sizes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hand_scene import INTRINSIC, SCENE
from w2r2_ds.data.frames.projection import load_depth
from w2r2_ds.data.sources.frames import IDENTITY_POSE, SceneParts
from w2r2_ds.data.sources.scannet import ALL_PARTS, Scene, load_scene


@pytest.fixture
def images(root: Path) -> Path:
    return root / "posed_images" / SCENE


def load(images: Path, parts: SceneParts = ALL_PARTS) -> Scene:
    return load_scene(images.parents[1], SCENE, parts)


FOLDER = {"jpg": "color", "png": "depth", "txt": "pose"}
RENAMED: dict[str, Callable[[int, str], str]] = {
    "sens_reader": lambda i, kind: f"frame-{i:06d}.{FOLDER[kind]}.{kind}",
    "folders": lambda i, kind: f"{FOLDER[kind]}/{i}.{kind}",
    "frames_25k": lambda i, kind: f"{FOLDER[kind]}/{i:06d}.{kind}",
    "six_digits": lambda i, kind: f"{i:06d}.{kind}",
    "upper_case": lambda i, kind: f"{i:05d}.{'JPEG' if kind == 'jpg' else kind}",
}


@pytest.mark.parametrize("name", RENAMED)
def test_names_of_other_extractors(images: Path, name: str) -> None:
    expected = load(images)
    for folder in ("color", "depth", "pose"):
        (images / folder).mkdir()
    for file in [path for path in images.iterdir() if path.stem.isdecimal()]:
        file.rename(images / RENAMED[name](int(file.stem), file.suffix[1:]))
    scene = load(images)
    assert [frame.index for frame in scene.frames] == [0, 1, 2] and scene.frames_without_pose == 1
    for frame, other in zip(scene.frames, expected.frames, strict=True):
        assert frame.color == images / RENAMED[name](frame.index, "jpg")
        np.testing.assert_array_equal(frame.cam_to_world, other.cam_to_world)
        assert load_depth(frame)[0, 0] == (3000, 2000, 3000)[frame.index]


def test_16_bit_pgm_depth_of_the_sens_reader(images: Path) -> None:
    for path in images.glob("0*.png"):
        Image.fromarray(np.array(Image.open(path)).astype(np.int32)).save(path.with_suffix(".pgm"))
        path.unlink()
    assert load_depth(load(images).frames[1])[0, 0] == 2000


@pytest.mark.parametrize(
    ("color", "depth"),
    [
        ("intrinsic/intrinsic_color.txt", "intrinsic/intrinsic_depth.txt"),
        ("intrinsics_color.txt", "intrinsics_depth.txt"),
    ],
)
def test_intrinsics_of_other_extractors(images: Path, color: str, depth: str) -> None:
    for old, new in (("intrinsic.txt", color), ("depth_intrinsic.txt", depth)):
        (images / new).parent.mkdir(exist_ok=True)
        (images / old).rename(images / new)
    scene = load(images)
    np.testing.assert_array_equal(scene.intrinsic, INTRINSIC)
    np.testing.assert_array_equal(scene.depth_intrinsic, INTRINSIC)


def test_intrinsics_in_the_info_file_of_the_sens_reader(images: Path) -> None:
    words = " ".join(str(value) for value in INTRINSIC.ravel())
    (images / "intrinsic.txt").unlink()
    (images / "_info.txt").write_text(f"m_colorWidth = 64\nm_calibrationColorIntrinsic = {words}\n")
    np.testing.assert_array_equal(load(images).intrinsic, INTRINSIC)
    (images / "_info.txt").write_text("m_colorWidth = 64\n")
    with pytest.raises(ValueError, match=r"_info\.txt.*m_calibrationColorIntrinsic"):
        load(images)


def test_other_names_are_listed_with_the_expected_ones(images: Path) -> None:
    for path in images.glob("0*.jpg"):
        path.rename(images / f"rgb_{path.name}")
    with pytest.raises(ValueError) as caught:
        load(images)
    for name in ("00000.jpg", "frame-000000.color.jpg", "color/0.jpg", "00000.png", "more files"):
        assert name in str(caught.value)


def test_names_of_two_extractors_or_twice_the_same_number_raise(images: Path) -> None:
    other = images / "0.jpg"
    other.write_bytes((images / "00000.jpg").read_bytes())
    with pytest.raises(ValueError, match=r"0\.jpg and 00000\.jpg have the same frame number"):
        load(images)
    other.rename(images / "frame-000000.color.jpg")
    with pytest.raises(ValueError, match=r"00000\.jpg and frame-000000\.color\.jpg"):
        load(images)


@pytest.mark.parametrize(
    ("file", "kind"),
    [
        ("00001.jpg", "frames without a colour image"),
        ("00001.png", "frames without a depth image"),
        ("00001.txt", "frames without a pose file"),
    ],
)
def test_a_frame_without_a_file_is_lost(images: Path, file: str, kind: str) -> None:
    (images / file).unlink()
    scene = load(images)
    assert [frame.index for frame in scene.frames] == [0, 2]
    assert [each.example for each in scene.skipped_inputs if each.kind == kind] == [f"{images}: frame 1"]


def test_most_frames_without_a_file_are_an_error(images: Path) -> None:
    for i in (0, 1, 3):
        (images / f"0000{i}.png").unlink()
    with pytest.raises(ValueError, match=r"most frames cannot be used \(3 frames without a depth image"):
        load(images)
    assert len(load(images, ALL_PARTS & ~SceneParts.DEPTH).frames) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda pose: pose * [[2.0], [2.0], [2.0], [1.0]], "orthonormal"),
        (lambda pose: np.linalg.inv(pose).T, "last row"),
        (lambda pose: pose @ np.diag([1.0, 1.0, -1.0, 1.0]), "determinant"),
    ],
)
def test_a_pose_that_is_not_rigid_raises(
    images: Path, change: Callable[[np.ndarray], np.ndarray], message: str
) -> None:
    path = images / "00001.txt"
    np.savetxt(path, change(np.loadtxt(path)))
    with pytest.raises(ValueError, match=rf"00001\.txt: .*{message}"):
        load(images)
    assert len(load(images, SceneParts.NONE).frames) == 3, "a task without poses does not check them"


def test_rounded_poses_are_rigid(images: Path) -> None:
    """EmbodiedScan's extractor writes 6 digits, other tools 3."""
    angle = np.array([[0.8, -0.36, 0.48], [0.6, 0.48, -0.64], [0.0, 0.8, 0.6]])
    pose = np.loadtxt(images / "00001.txt")
    pose[:3, :3] = np.round(angle @ pose[:3, :3], 3)
    np.savetxt(images / "00001.txt", pose)
    assert len(load(images).frames) == 3


def test_poses_in_millimetres_raise(images: Path) -> None:
    for i in range(3):
        pose = np.loadtxt(images / f"0000{i}.txt")
        pose[:3, 3] *= 1000
        np.savetxt(images / f"0000{i}.txt", pose)
    with pytest.raises(ValueError, match=rf"{SCENE}: the cameras .* 1000 m.*metres"):
        load(images)


def test_repeated_identities_are_lost_frames(images: Path) -> None:
    np.savetxt(images / "00000.txt", np.eye(4))
    assert len(load(images).frames) == 3, "the first camera may be the world"
    np.savetxt(images / "00002.txt", np.eye(4))
    scene = load(images)
    assert [frame.index for frame in scene.frames] == [1]
    assert sum(each.kind == IDENTITY_POSE for each in scene.skipped_inputs) == 2


@pytest.mark.parametrize("size", [(32, 24), (40, 30), (128, 96), (48, 64)])
@pytest.mark.parametrize(("kind", "file"), [("jpg", "intrinsic.txt"), ("png", "depth_intrinsic.txt")])
def test_intrinsics_of_another_image_size_raise(images: Path, size: tuple[int, int], kind: str, file: str) -> None:
    """Halved, three fifths, doubled, and turned images, with intrinsics of 64 x 48."""
    for path in images.glob(f"0*.{kind}"):
        Image.open(path).resize(size).save(path)
    with pytest.raises(ValueError, match=rf"/{file} .* 63 x 47 .*\.{kind} has {size[0]} x {size[1]}"):
        load(images)
    needed = SceneParts.INTRINSICS if kind == "png" else SceneParts.DEPTH
    assert len(load(images, SceneParts.POSES | needed).frames) == 3


@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_images_of_two_sizes_raise_if_intrinsics_are_used(images: Path, kind: str) -> None:
    path = images / f"00001.{kind}"
    Image.open(path).resize((80, 60)).save(path)
    with pytest.raises(ValueError, match=rf"00001\.{kind} has 80 x 60 pixels, but 00000\.{kind} 64 x 48"):
        load(images)
    assert len(load(images, SceneParts.POSES | SceneParts.BOXES).frames) == 3
