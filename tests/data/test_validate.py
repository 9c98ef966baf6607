"""Checks before training: every frame file, and the length of every sample."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from depth_scenes import with_depth
from w2r2_ds.config.schema import GeometryConfig
from w2r2_ds.data import images
from w2r2_ds.data.images import load_frame
from w2r2_ds.data.loader import make_processor
from w2r2_ds.data.validate import check_frames, check_geometry_files, check_sample_texts
from w2r2_ds.models.geometry.encoder import geometry_spec


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Paths of the fully decoded files, in order."""
    paths: list[Path] = []

    def load(path: Path) -> np.ndarray:
        paths.append(path)
        return load_frame(path)

    monkeypatch.setattr(images, "load_frame", load)
    return paths


def picture(path: Path, kind: str = "JPEG") -> Path:
    """An image file of noise, several KiB."""
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, kind)
    return path


def sample_of(samples: list[Any], *frames: Path) -> Any:
    return replace(samples[0], frames=frames)


def test_every_file_is_read_once(samples: list[Any], tmp_path: Path, decoded: list[Path]) -> None:
    files = [picture(tmp_path / f"{index}.jpg") for index in range(3)] + [picture(tmp_path / "3.png", "PNG")]
    shared = [sample_of(samples, *files[:3]), sample_of(samples, *files[1:]), sample_of(samples)]
    assert check_frames(shared) == 4
    assert check_frames([]) == check_frames([sample_of(samples)]) == 0
    assert not decoded, "whole files are not decoded"


def test_depth_is_checked_for_encoders_of_point_maps(
    depth_samples: list[Any], model_config: Any, tmp_path: Path
) -> None:
    """Every rank checks a part; the message has the encoder and the file. Poses count if the coordinates need them."""
    (sample,) = with_depth(tmp_path, depth_samples[:1])
    world, camera = (
        geometry_spec(GeometryConfig(name="point_map", reference_frame=frame))  # type: ignore[arg-type]
        for frame in ("world", "camera")
    )
    assert [check_geometry_files([sample], "point_map", world, rank, 3) for rank in range(3)] == [2, 1, 1]
    assert check_geometry_files([sample, sample], "point_map", camera) == 4
    assert check_geometry_files([sample], "vggt", geometry_spec(model_config.geometry)) == 0
    sample.frames[2].with_suffix(".txt").unlink()
    assert check_geometry_files([sample], "point_map", camera) == 4
    with pytest.raises(ValueError, match=r"model\.geometry\.name point_map .*pose.*00002\.txt"):
        check_geometry_files([sample], "point_map", world)
    assert check_geometry_files([sample], "point_map", world, 1, 2) == 2, "of another rank"
    sample.frames[0].with_suffix(".png").unlink()
    for spec in (world, camera):
        with pytest.raises(ValueError, match=r"model\.geometry\.name point_map .*depth.*00000\.png"):
            check_geometry_files([sample], "point_map", spec, 0, 2)


def test_ranks_split_the_files_and_one_raises_for_a_bad_file(samples: list[Any], tmp_path: Path) -> None:
    files = [picture(tmp_path / f"{index}.jpg") for index in range(5)]
    every = [sample_of(samples, *files[:3]), sample_of(samples, *files[2:])]
    assert [check_frames(every, rank, 3) for rank in range(3)] == [2, 2, 1]
    files[4].unlink()
    assert [check_frames(every, rank, 3) for rank in (0, 2)] == [2, 1]
    with pytest.raises(ValueError, match=r"4\.jpg does not exist"):
        check_frames(every, 1, 3)


@pytest.mark.parametrize("kept", [0, 10, 1000, -2000, -200, -50])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_truncated_file_raises_with_its_path(samples: list[Any], tmp_path: Path, kind: str, kept: int) -> None:
    whole, cut = picture(tmp_path / "whole.jpg"), picture(tmp_path / "cut.jpg", kind)
    cut.write_bytes(cut.read_bytes()[:kept])
    with pytest.raises(ValueError, match=f"Frame {cut} cannot be read .*; replace the file") as caught:
        check_frames([sample_of(samples, whole, cut)])
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def test_the_error_has_the_first_of_several_bad_files(samples: list[Any], tmp_path: Path) -> None:
    missing = [tmp_path / f"{index}.jpg" for index in range(40)]
    with pytest.raises(ValueError, match=rf"Frame {missing[0]} does not exist"):
        check_frames([sample_of(samples, *missing)])


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize(("appended", "decodes"), [(1000, 0), (5000, 1)])
def test_data_after_the_end_marker_is_no_damage(
    samples: list[Any], tmp_path: Path, decoded: list[Path], kind: str, appended: int, decodes: int
) -> None:
    path = picture(tmp_path / "frame.jpg", kind)
    path.write_bytes(path.read_bytes() + b"\0" * appended)
    assert check_frames([sample_of(samples, path)]) == 1
    assert decoded == [path] * decodes


def test_other_formats_are_decoded(samples: list[Any], tmp_path: Path, decoded: list[Path]) -> None:
    webp = picture(tmp_path / "frame.webp", "WEBP")
    assert check_frames([sample_of(samples, webp)]) == 1
    assert decoded == [webp]
    page = tmp_path / "page.jpg"
    page.write_text("<html>404</html>")
    with pytest.raises(ValueError, match=f"Frame {page} cannot be read"):
        check_frames([sample_of(samples, page)])


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_a_depth_map_in_the_place_of_a_frame_raises_with_its_path(
    samples: list[Any], tmp_path: Path, decoded: list[Path], kind: str
) -> None:
    depth = tmp_path / "depth.jpg"
    Image.fromarray(np.zeros((24, 32), dtype=np.uint16)).save(depth, "PNG")
    with pytest.raises(ValueError, match=f"Frame {depth} .*more than 8 bits"):
        check_frames([sample_of(samples, picture(tmp_path / "good.jpg", kind), depth)])
    assert depth not in decoded, "the header is enough"


def test_a_narrow_frame_among_others_raises_with_its_path(
    frontend: Any, data_config: Any, samples: list[Any], tmp_path: Path, no_decoding: None
) -> None:
    good, narrow = picture(tmp_path / "good.jpg"), tmp_path / "narrow.png"
    Image.new("RGB", (3000, 10)).save(narrow)
    bad = sample_of(samples, good, narrow)
    for fit in ("crop", "pad"):
        processor = make_processor(frontend, data_config(frame_fit=fit))
        with pytest.raises(ValueError, match=rf"Frame {narrow}: .*3000 x 10 pixels"):
            check_sample_texts([bad], processor)
        with pytest.raises(ValueError, match=str(narrow)):
            processor.preprocess.sizes(bad.frames)


def test_frames_below_one_merged_patch_raise_with_a_path(
    frontend: Any, data_config: Any, samples: list[Any], tmp_path: Path
) -> None:
    low = tmp_path / "low.png"
    Image.new("RGB", (60, 15)).save(low)
    processor, sample = make_processor(frontend, data_config()), sample_of(samples, low)
    with pytest.raises(ValueError, match=rf"{low}.*data\.frame_width"):
        check_sample_texts([sample], processor)
    with pytest.raises(ValueError, match=rf"{low}.*data\.frame_width"):
        processor(sample, with_answer=True)
    # A higher frame in the same sample makes room: the low one is padded.
    mixed = sample_of(samples, low, picture(tmp_path / "good.jpg"))
    assert check_sample_texts([mixed], processor) == 1


def test_cropped_frames_are_reported_once(
    frontend: Any, data_config: Any, samples: list[Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wide, high = picture(tmp_path / "wide.jpg"), tmp_path / "high.png"
    Image.new("RGB", (42, 56)).save(high)
    chosen = [sample_of(samples, wide, high)] * 3
    assert check_sample_texts(chosen, make_processor(frontend, data_config())) == 3
    (record,) = caplog.records
    message = record.getMessage()
    assert "1 of 2 frames" in message and "20 %" in message and str(high) in message and "data.frame_fit" in message
    caplog.clear()
    assert check_sample_texts(chosen, make_processor(frontend, data_config(frame_fit="pad"))) == 3
    assert check_sample_texts([sample_of(samples, wide)], make_processor(frontend, data_config())) == 1
    assert not caplog.records


@pytest.fixture
def no_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding any frame raises."""

    def load(path: Path) -> np.ndarray:
        raise AssertionError(f"{path} is decoded")

    monkeypatch.setattr("w2r2_ds.data.visual_inputs.load_resized", load)


@pytest.mark.parametrize("visual", ["images", "video"])
@pytest.mark.parametrize("with_answer", [True, False])
def test_the_length_equals_that_of_the_processor(
    frontend: Any,
    data_config: Any,
    samples: list[Any],
    text_samples: list[Any],
    caption_sample: Any,
    monkeypatch: pytest.MonkeyPatch,
    visual: str,
    with_answer: bool,
) -> None:
    every = [*samples, *text_samples, caption_sample, replace(samples[0], id="é", question="…é中" * 9, what=(0, 0))]
    lengths = [len(make_processor(frontend, data_config(visual=visual))(s, with_answer).input_ids) for s in every]
    monkeypatch.setattr("w2r2_ds.data.visual_inputs.load_resized", None)
    for sample, length in zip(every, lengths, strict=True):
        processors = [make_processor(frontend, data_config(visual=visual, max_length=length - n)) for n in (0, 1)]
        assert check_sample_texts([sample], processors[0], with_answer=with_answer) == 1
        with pytest.raises(ValueError, match=f"Sample {sample.id} has {length} tokens, more than data.max_length = "):
            check_sample_texts([sample], processors[1], with_answer=with_answer)


def test_a_short_text_is_not_encoded(
    frontend: Any, data_config: Any, samples: list[Any], no_decoding: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Encoding 36,665 texts takes most of a minute. The placeholders of equal frames are counted once."""
    processor = make_processor(frontend, data_config(max_length=9000))
    encoded: list[str] = []
    count = processor._count
    monkeypatch.setattr(processor, "_count", lambda text: encoded.append(text) or count(text))
    assert check_sample_texts([samples[0]] * 5, processor) == 5
    assert len(encoded) == 2 and not any(samples[0].question in text for text in encoded)


def test_a_sample_without_an_answer_cannot_be_trained_on(frontend: Any, data_config: Any, samples: list[Any]) -> None:
    processor = make_processor(frontend, data_config())
    unanswered = replace(samples[0], answer="")
    assert check_sample_texts([unanswered], processor, with_answer=False) == 1
    with pytest.raises(ValueError, match=f"{re.escape(unanswered.id)}.* has no answer"):
        check_sample_texts([samples[0], unanswered], processor)


def test_the_message_has_the_longest_length(frontend: Any, data_config: Any, samples: list[Any]) -> None:
    lengths = [len(make_processor(frontend, data_config())(sample, True).input_ids) for sample in samples]
    with pytest.raises(ValueError) as caught:
        check_sample_texts(samples, make_processor(frontend, data_config(max_length=100)))
    assert str(caught.value) == (
        f"Sample four has {lengths[0]} tokens, more than data.max_length = 100; raise it or use fewer or smaller "
        f"frames (also three, twelve; the longest has {max(lengths)} tokens)."
    )


@pytest.mark.parametrize("token", ["<|im_end|>", "<|image_pad|>"])
def test_a_special_token_raises_on_the_rank_of_its_sample(
    frontend: Any, data_config: Any, samples: list[Any], no_decoding: None, token: str
) -> None:
    processor = make_processor(frontend, data_config())
    asks = replace(samples[0], id="asks", question=f"where is {token}?", what=(0, 0))
    answers = replace(samples[0], id="answers", answer=samples[0].answer + token)
    every = [*samples, asks, samples[0]]  # the ranks check one, two and two
    assert check_sample_texts(every, processor, 0, 3) == 1 and check_sample_texts(every, processor, 1, 3) == 2
    with pytest.raises(
        ValueError, match=f"^Sample asks: .* special token '{re.escape(token)}'; remove it .* again\\.$"
    ):
        check_sample_texts(every, processor, 2, 3)
    with pytest.raises(ValueError, match=r"^Sample answers: .* prepare the data set again \(also asks\)\.$"):
        check_sample_texts([samples[0], answers, asks], processor)
    assert check_sample_texts([answers], processor, with_answer=False) == 1
    with pytest.raises(
        ValueError, match=r"prepare the data set again \(also asks, asks, asks, asks, asks and 2 more\)\.$"
    ):
        check_sample_texts([asks] * 8, processor)
