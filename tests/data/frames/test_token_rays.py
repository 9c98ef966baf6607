"""Pixels and rays of visual tokens, against the pixels that pre-processing puts into a token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from anchor_batches import FOCAL, write_intrinsic
from w2r2_ds.data.frames.token_rays import scene_intrinsic, token_points, token_rays
from w2r2_ds.data.sources.frame_files import scene_folder
from w2r2_ds.data.visual_inputs import VisualPreprocessor
from w2r2_ds.types.geometry import GeometrySpec
from w2r2_ds.types.sample import Sample

WIDTH = 140


def preprocessor(frontend: Any, data_config: Any, **changes: Any) -> VisualPreprocessor:
    config = data_config(frame_width=WIDTH, decode_threads=1, **changes)
    return VisualPreprocessor(frontend.family, frontend.vision, GeometrySpec(14, 8), config)


def sample_of(folder: Path, images: list[np.ndarray]) -> Sample:
    paths = []
    for index, image in enumerate(images):
        paths.append(folder / f"{index:05}.png")
        Image.fromarray(image).save(paths[-1])
    poses = np.tile(np.eye(4), (len(images), 1, 1))
    return Sample("one", "scanrefer", "scene0000_00", tuple(paths), poses, "Where?", "there")


@pytest.mark.parametrize(
    ("size", "fit"),
    [((200, 150), "crop"), ((90, 170), "crop"), ((170, 90), "pad"), ((90, 170), "pad"), ((333, 222), "crop")],
    ids=str,
)
def test_a_tokens_pixel_is_where_its_content_is(
    tmp_path: Path, frontend: Any, data_config: Any, size: tuple[int, int], fit: str
) -> None:
    """Images whose red and green channels are their own x and y: the mean colour of a token is its centre's pixel.

    Tokens that contain white padding are skipped: blue is 0 in the image.
    """
    width, height = size
    y, x = np.mgrid[:height, :width]
    scale = 250 / max(size)
    image = np.stack([x * scale, y * scale, np.zeros_like(x)], axis=-1).round().astype(np.uint8)
    # One frame of another size: all frames of a sample are padded to the largest.
    other = np.zeros((height - height // 4, width, 3), dtype=np.uint8)
    sample = sample_of(tmp_path, [image, other])
    preprocess = preprocessor(frontend, data_config, frame_fit=fit)
    frames, pixels = token_points(sample, preprocess)
    inputs = preprocess.compute(sample)
    assert inputs.tower_frames is not None and len(frames) == int(inputs.grid_thw.prod(-1).sum()) // 4
    resized, side = inputs.tower_frames[0].permute(1, 2, 0).double().numpy(), 28
    rows, columns = resized.shape[0] // side, resized.shape[1] // side
    tokens = resized[: rows * side, : columns * side].reshape(rows, side, columns, side, 3).swapaxes(1, 2)
    content = tokens.reshape(rows * columns, -1, 3)
    own = pixels[frames == 0, 0]
    inside = content[..., 2].max(1) < 3
    assert inside.sum() >= 5 and (frames == 1).sum() == len(own)
    error = np.abs(content.mean(1)[inside, :2] / scale - own[inside])
    assert error.max() < 0.75  # pixels of the file: rounding of colours (0.7 / 250 of a side), extension at the border


def test_rays_point_at_the_pixels(tmp_path: Path, frontend: Any, data_config: Any) -> None:
    sample = sample_of(tmp_path, [np.zeros((150, 200, 3), dtype=np.uint8)] * 3)
    write_intrinsic(sample, 200, 150)
    preprocess = preprocessor(frontend, data_config)
    frames, pixels = token_points(sample, preprocess)
    of_rays, rays = token_rays(sample, preprocess)
    assert np.array_equal(frames, of_rays) and frames.tolist() == [0] * 20 + [1] * 20 + [2] * 20
    np.testing.assert_allclose(rays[:, :2] * FOCAL + [99.5, 74.5], pixels[:, 0])
    assert (rays[:, 2] == 1).all()
    # The middle token of 5 columns points straight ahead.
    assert abs(rays[2, 0]) < 1e-12 and rays[0, 0] < 0 < rays[4, 0] and rays[0, 1] < 0


def test_points_in_a_token(tmp_path: Path, frontend: Any, data_config: Any) -> None:
    """Parts of a token of 28 pixels, which are 40 pixels of the file: their mean is the centre."""
    sample = sample_of(tmp_path, [np.zeros((150, 200, 3), dtype=np.uint8)])
    preprocess = preprocessor(frontend, data_config)
    (_, centres), (_, points) = (token_points(sample, preprocess, count) for count in (1, 2))
    assert points.shape == (20, 4, 2)
    np.testing.assert_allclose(points.mean(1), centres[:, 0])
    np.testing.assert_allclose(points[0, :, 0], [9.5, 29.5, 9.5, 29.5])
    np.testing.assert_allclose(np.diff(points[:, [0, 2], 1]), 14 * 150 / 112)


def test_a_token_of_a_video_has_the_first_of_its_two_frames(tmp_path: Path, frontend: Any, data_config: Any) -> None:
    sample = sample_of(tmp_path, [np.zeros((150, 200, 3), dtype=np.uint8)] * 5)
    frames, _ = token_points(sample, preprocessor(frontend, data_config, visual="video"))
    assert frames.tolist() == [0] * 20 + [2] * 20 + [4] * 20


def test_scenes_without_intrinsics_are_an_error(tmp_path: Path, frontend: Any, data_config: Any) -> None:
    sample = sample_of(tmp_path, [np.zeros((150, 200, 3), dtype=np.uint8)])
    with pytest.raises(ValueError, match=r"intrinsic\.txt"):
        token_rays(sample, preprocessor(frontend, data_config))
    assert scene_folder(Path("posed_images/scene/color/0.jpg")) == Path("posed_images/scene")
    with pytest.raises(ValueError, match=r"intrinsic\.txt"):
        scene_intrinsic(tmp_path)
