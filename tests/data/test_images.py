"""Loading, resizing and cropping of frames."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

from w2r2_ds.data.images import (
    ORIENTATIONS,
    fitted_size,
    frame_size,
    load_frame,
    load_resized,
    lost_height,
    resize_frames,
)


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def frames(count: int, height: int, width: int) -> np.ndarray:
    """``uint8 [count, height, width, 3]``."""
    return np.stack([noise(height, width, seed) for seed in range(count)])


def pixels(images: np.ndarray) -> np.ndarray:
    """``uint8 [count, 3, height, width]``."""
    return images.transpose(0, 3, 1, 2)


def test_a_colour_image_is_unchanged(tmp_path: Path) -> None:
    Image.fromarray(noise(5, 7)).save(tmp_path / "frame.png")
    np.testing.assert_array_equal(load_frame(tmp_path / "frame.png"), noise(5, 7))


def test_a_transparent_image_is_put_on_white(tmp_path: Path) -> None:
    image = Image.new("RGBA", (3, 1))
    for column, colour in enumerate([(10, 20, 30, 255), (10, 20, 30, 0), (0, 0, 0, 51)]):
        image.putpixel((column, 0), colour)
    image.save(tmp_path / "frame.png")
    assert load_frame(tmp_path / "frame.png").tolist() == [[[10, 20, 30], [255, 255, 255], [204, 204, 204]]]


def test_a_gray_image_has_three_equal_channels(tmp_path: Path) -> None:
    Image.fromarray(noise(5, 7)[:, :, 0]).save(tmp_path / "frame.png")
    np.testing.assert_array_equal(load_frame(tmp_path / "frame.png"), noise(5, 7)[:, :, :1].repeat(3, axis=2))


def test_a_missing_frame_raises_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"{tmp_path / 'nowhere.jpg'} does not exist; .* correct data\.root "):
        load_frame(tmp_path / "nowhere.jpg")


@pytest.mark.parametrize("kept", [0, 10, 1000, -200])
def test_a_truncated_jpeg_raises_with_its_path(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "frame.jpg"
    Image.fromarray(noise(60, 80)).save(path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=f"{path} cannot be read"):
        load_frame(path)


def test_a_truncated_png_raises_with_its_path(tmp_path: Path) -> None:
    path = tmp_path / "frame.png"
    Image.fromarray(noise(60, 80)).save(path)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(ValueError, match=f"{path} cannot be read"):
        load_frame(path)


def test_a_depth_map_is_rejected(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 3000, dtype=np.uint16)).save(tmp_path / "depth.png")
    with pytest.raises(ValueError, match="more than 8 bits"):
        load_frame(tmp_path / "depth.png")


@pytest.mark.parametrize("orientation", [1, *ORIENTATIONS])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_is_applied(tmp_path: Path, kind: str, orientation: int) -> None:
    path, exif = tmp_path / "phone.jpg", Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.fromarray(noise(24, 40)).save(path, kind, exif=exif)
    with Image.open(path) as stored:
        upright = np.asarray(ImageOps.exif_transpose(stored).convert("RGB"))
    np.testing.assert_array_equal(load_frame(path), upright)
    assert frame_size(path) == ((24, 40) if orientation >= 5 else (40, 24)) == upright.shape[1::-1]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("exif", [b"Exif\0\0no TIFF header", b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01", b"Exif\0\0"])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_a_damaged_exif_block_is_ignored(tmp_path: Path, kind: str, exif: bytes) -> None:
    path, plain = tmp_path / "frame.jpg", tmp_path / "plain.jpg"
    Image.fromarray(noise(24, 40)).save(path, kind, exif=exif)
    Image.fromarray(noise(24, 40)).save(plain, kind)
    np.testing.assert_array_equal(load_frame(path), load_frame(plain))
    assert frame_size(path) == (40, 24)


def test_a_transparent_image_is_turned_too(tmp_path: Path) -> None:
    path, exif = tmp_path / "frame.png", Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGBA", (3, 2), (0, 0, 0, 0)).save(path, exif=exif)
    assert load_frame(path).shape == (3, 2, 3) and load_frame(path).min() == 255


@pytest.mark.parametrize("mode", ["crop", "pad"])
def test_a_file_is_resized_as_its_pixels(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "frame.jpg"
    Image.fromarray(noise(75, 61)).save(path)
    resized = load_resized(path, 56, 14, mode)
    wanted = pixels(resized[None])
    np.testing.assert_array_equal(resize_frames([load_frame(path)], 56, 14, mode), wanted)


@pytest.mark.parametrize(
    ("size", "lost"), [((64, 48), 0.0), ((48, 48), 0.0), ((756, 1008), 1 - 518 / 686), ((100, 400), 0.75)]
)
def test_the_lost_height_is_that_of_the_crop(size: tuple[int, int], lost: float) -> None:
    assert lost_height(size, 518, 14) == pytest.approx(lost, abs=1e-12)
    assert lost_height(size, 518, 14, "pad") == 0
    # With a marker in the rows: the fraction of the rows that remain.
    ramp = np.repeat(np.linspace(0, 255, size[1]).astype(np.uint8)[:, None, None], 3, axis=2).repeat(size[0], axis=1)
    kept = resize_frames([ramp], 518, 14)[0, 0, :, 0].astype(float)
    assert (kept[-1] - kept[0]) / 255 == pytest.approx(1 - lost, abs=0.01)


def test_default_width_is_518() -> None:
    assert resize_frames([noise(48, 64)], width=518, patch=14).shape == (1, 3, 392, 518)


def test_width_is_rounded_to_a_multiple_of_14() -> None:
    assert resize_frames([noise(75, 101)], width=56, patch=14).shape == (1, 3, 42, 56)
    assert resize_frames([noise(101, 75)], width=56, patch=14, mode="pad").shape == (1, 3, 56, 56)


@pytest.mark.parametrize("width", [0, -14, 100])
def test_a_target_width_that_is_no_multiple_of_14_is_rejected(width: int) -> None:
    with pytest.raises(ValueError, match=f"width {width} must be a positive multiple of 14"):
        resize_frames([noise(28, 28)], width=width, patch=14)


def test_frames_of_the_target_size_keep_their_pixels() -> None:
    given = frames(2, 28, 56)
    np.testing.assert_array_equal(resize_frames(list(given), width=56, patch=14), pixels(given))


def test_crop_keeps_the_middle_of_a_high_frame() -> None:
    tall = noise(84, 56)
    np.testing.assert_array_equal(resize_frames([tall], width=56, patch=14), pixels(tall[None, 14:70]))


@pytest.mark.parametrize(
    "sizes", [[(640, 480)], [(1296, 968)], [(100, 181)], [(83, 61), (47, 61)], [(300, 60), (60, 30)]]
)
@pytest.mark.parametrize("width", [28, 126, 518])
@pytest.mark.parametrize("mode", ["crop", "pad"])
def test_sizes_follow_from_the_file_headers(
    tmp_path: Path, sizes: list[tuple[int, int]], width: int, mode: str
) -> None:
    for index, size in enumerate(sizes):
        Image.new("RGB", size).save(tmp_path / f"{index}.jpg")
    assert [frame_size(tmp_path / f"{index}.jpg") for index in range(len(sizes))] == sizes
    try:
        images = resize_frames([noise(height, width) for width, height in sizes], width, 14, mode)
    except ValueError as error:
        with pytest.raises(ValueError) as caught:
            fitted_size(sizes, width, 14, mode)
        assert str(caught.value) == str(error)
    else:
        assert images.shape[2:] == fitted_size(sizes, width, 14, mode)[::-1] and images.dtype == np.uint8


def test_pad_puts_white_left_and_right_of_a_high_frame() -> None:
    tall = noise(56, 28)
    padded = resize_frames([tall], width=56, patch=14, mode="pad")
    np.testing.assert_array_equal(padded[..., 14:42], pixels(tall[None]))
    assert (padded[..., :14] == 255).all()
    assert (padded[..., 42:] == 255).all()


def test_frames_of_unequal_height_are_centred_on_white() -> None:
    low, high = noise(28, 56), noise(56, 56)
    both = resize_frames([low, high], width=56, patch=14)
    np.testing.assert_array_equal(both[1], pixels(high[None])[0])
    np.testing.assert_array_equal(both[0, :, 14:42], pixels(low[None])[0])
    assert (both[0, :, :14] == 255).all()
    assert (both[0, :, 42:] == 255).all()


def test_no_frames_are_rejected() -> None:
    with pytest.raises(ValueError, match="at least one"):
        resize_frames([], width=56, patch=14)


def test_an_unknown_mode_is_rejected() -> None:
    with pytest.raises(ValueError, match="'stretch'"):
        resize_frames([noise(28, 28)], width=56, patch=14, mode="stretch")


def test_a_frame_with_a_resized_side_of_zero_is_rejected() -> None:
    with pytest.raises(ValueError, match="200 x 2 pixels"):
        resize_frames([noise(2, 200)], width=56, patch=14)


def test_a_frame_of_floats_is_rejected() -> None:
    with pytest.raises(ValueError, match="float32"):
        resize_frames([np.zeros((28, 28, 3), dtype=np.float32)], width=28, patch=14)
