"""Collated batches: answer positions, labels, visuals and positions for every kind of sample."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from encoder_inputs import geometry_images, pixel_values
from w2r2_ds.data.answer_tokens import MAX_NUMBERS
from w2r2_ds.data.batching.collate import dummy_visuals
from w2r2_ds.data.loader import make_collate, make_processor, prompt_loader
from w2r2_ds.types.batch import map_tensors


@pytest.mark.parametrize("visual", ["images", "video"])
def test_answer_positions_select_the_answer_tokens(
    frontend: Any, batch_of: Any, samples: list[Any], visual: str
) -> None:
    batch = batch_of(samples, visual=visual)
    positions = batch.answer_positions
    assert torch.equal(batch.input_ids[positions.sample, positions.position + 1], positions.label)
    assert batch.attention_mask[positions.sample, positions.position + 1].all()
    for index, sample in enumerate(samples):
        mine = positions.sample == index
        assert frontend.tokenizer.decode(positions.label[mine]) == sample.answer + "<|im_end|>"
        before = batch.input_ids[index, int(positions.position[mine][0])]
        assert (
            frontend.tokenizer.decode(before) == "\n"
        )  # the last token of the prompt predicts the first of the answer


def test_digit_tokens_select_the_digits(frontend: Any, batch_of: Any, samples: list[Any]) -> None:
    batch = batch_of(samples)
    positions = batch.answer_positions
    tokens = frontend.tokenizer.convert_ids_to_tokens(positions.label.tolist())
    found = torch.zeros_like(positions.where)
    for index in range(len(samples)):
        numbers = []
        for number in range(MAX_NUMBERS):
            at = positions.digit[index, number]
            at = at[at >= 0]
            assert (positions.sample[at] == index).all() and positions.sample[positions.sign[index, number]] == index
            text = "".join(tokens[i] for i in at)
            sign = -1 if tokens[positions.sign[index, number]].endswith("-") else 1
            numbers.append(sign * float(text))
            value = sum(
                int(tokens[i]) * p for i, p in zip(at, positions.place_value[index, number], strict=False) if p > 0
            )
            assert sign * value == pytest.approx(numbers[-1])
            found[at[positions.place_value[index, number, : len(at)] > 0]] = True
        text = samples[index].answer
        expected = [int(text.split('"frame": ')[1].split(",")[0])]
        expected += [float(part) for part in text.split("[")[1].split("]")[0].split(",")]
        assert numbers == expected
    assert torch.equal(found, positions.where)
    assert (positions.place_value[positions.digit < 0] == 0).all()


def test_right_padding_for_training(frontend: Any, batch_of: Any, samples: list[Any]) -> None:
    batch = batch_of(samples)
    lengths = batch.attention_mask.sum(1)
    assert len(set(lengths.tolist())) == 3 and lengths.max() == batch.input_ids.shape[1]
    for index, sample in enumerate(samples):
        single = batch_of([sample])
        length = int(lengths[index])
        assert torch.equal(batch.input_ids[index, :length], single.input_ids[0])
        assert (batch.input_ids[index, length:] == frontend.tokenizer.pad_token_id).all()
        assert (batch.token_types[index, length:] == 0).all()
        assert torch.equal(batch.position_ids[:, index, :length], single.position_ids[:, 0])


@pytest.mark.parametrize("visual", ["images", "video"])
def test_every_sample_is_a_sequence_and_a_group(batch_of: Any, samples: list[Any], visual: str) -> None:
    batch = batch_of(samples, visual=visual)
    layout, lengths = batch.layout, batch.attention_mask.sum(1).tolist()
    assert torch.equal(layout.group == 0, batch.attention_mask == 1) and set(layout.group.unique().tolist()) == {-1, 0}
    assert not layout.suffix.any() and layout.spans == tuple(((0, length),) for length in lengths)
    for positions in (batch.answer_positions, batch.description_positions):
        assert torch.equal(positions.sequence, positions.sample)
    assert sum(batch.visuals.sizes) == len(batch.visual_tokens) == int((batch.token_types > 0).sum())
    assert (batch.token_types.flatten()[batch.visual_tokens] > 0).all()
    sizes = [batch_of([sample], visual=visual).visuals.sizes for sample in samples]
    assert batch.visuals.sizes == sum(sizes, ())


def test_left_padding_for_generation(frontend: Any, batch_of: Any, samples: list[Any]) -> None:
    batch = batch_of(samples, with_answer=False)
    assert batch.position_ids is None and batch.optional_answer_positions is None and batch.layout is None
    assert batch.attention_mask[:, -1].all() and (batch.attention_mask.diff(dim=1) >= 0).all()
    for index, sample in enumerate(samples):
        single = batch_of([sample], with_answer=False)
        kept = batch.attention_mask[index].bool()
        assert torch.equal(batch.input_ids[index][kept], single.input_ids[0])
    with pytest.raises(AssertionError, match="no answer positions"):
        _ = batch.answer_positions


def test_visuals_poses_and_targets(batch_of: Any, samples: list[Any]) -> None:
    batch = batch_of(samples)
    assert batch.visuals.kind == "image"
    assert batch.visuals.grid_thw.tolist() == [[1, 2, 4]] * 4 + [[1, 4, 4]] * 3 + [[1, 2, 4]] * 12
    assert pixel_values(batch.visuals).shape[0] == int(batch.visuals.grid_thw.prod(-1).sum())
    assert [len(images) for images in batch.visuals.geometry_frames] == [4, 3, 12]
    assert batch.cam_to_world.shape == (3, 12, 4, 4) and batch.cam_to_world.dtype == torch.float64
    for index, sample in enumerate(samples):
        count = len(sample.frames)
        assert (batch.cam_to_world[index, :count].numpy() == sample.cam_to_world).all()
        assert batch.cam_to_world[index, count:].isnan().all()  # no frames
    assert (batch.target_box.numpy() == samples[0].target.box).all()


def test_description_positions_select_the_description_tokens(
    frontend: Any, batch_of: Any, samples: list[Any], caption_sample: Any, text_samples: list[Any]
) -> None:
    batch = batch_of([samples[0], caption_sample, text_samples[1], samples[1]])
    what = batch.description_positions
    assert what.sample.dtype == what.position.dtype == torch.int64
    assert (what.sample.diff() >= 0).all() and sorted(set(what.sample.tolist())) == [0, 2, 3]  # a caption has none
    for index, description in [(0, "The red chair."), (2, "The sofa."), (3, "A small brown table beside the white ")]:
        at = what.position[what.sample == index]
        assert frontend.tokenizer.decode(batch.input_ids[index, at]).strip().startswith(description.strip())
    assert batch_of(samples, with_answer=False).optional_description_positions is None
    with pytest.raises(AssertionError, match="no description positions"):
        _ = batch_of(samples, with_answer=False).description_positions


def test_mixed_tasks(
    frontend: Any, batch_of: Any, samples: list[Any], caption_sample: Any, answer_sample: Any, tables: Any
) -> None:
    """Captions and short answers have no digit tokens and no box, and do not change those of other samples."""
    mixed = batch_of([caption_sample, samples[0], answer_sample, samples[2]])
    plain = batch_of([samples[0], samples[2]])
    positions, single = mixed.answer_positions, plain.answer_positions
    assert mixed.kinds == ("caption", "grounding", "answer", "grounding")
    assert mixed.answers == (caption_sample.answer, samples[0].answer, "2 chairs", samples[2].answer)
    for index, sample in [(0, caption_sample), (2, answer_sample)]:
        mine = positions.sample == index
        assert frontend.tokenizer.decode(positions.label[mine & positions.where]) == sample.answer
        assert int((mine & ~positions.where).sum()) == 1  # the end of turn
        assert (positions.digit[index] == -1).all()
        assert not positions.place_value[index].any() and not positions.sign[index].any()
        assert mixed.target_box[index].isnan().all()
    for there, here in [(1, 0), (3, 1)]:
        first = int((positions.sample < there).sum()) - int((single.sample < here).sum())
        number = torch.where(single.digit[here] < 0, -1, single.digit[here] + first)
        assert torch.equal(positions.digit[there], number)
        assert torch.equal(positions.place_value[there], single.place_value[here])
        assert torch.equal(positions.sign[there], single.sign[here] + first)
        assert torch.equal(mixed.target_box[there], plain.target_box[here])
        mine, its = positions.sample == there, single.sample == here
        assert torch.equal(positions.where[mine], single.where[its])
        assert torch.equal(positions.label[mine], single.label[its])


def test_a_batch_without_numbers(batch_of: Any, caption_sample: Any, answer_sample: Any) -> None:
    positions = batch_of([caption_sample, answer_sample, caption_sample]).answer_positions
    assert positions.digit.tolist() == [[[-1]] * MAX_NUMBERS] * 3
    assert (
        positions.place_value.tolist() == [[[0.0]] * MAX_NUMBERS] * 3
        and positions.sign.tolist() == [[0] * MAX_NUMBERS] * 3
    )


def test_prompts_are_left_padded_and_optional(batch_of: Any, samples: list[Any], text_samples: list[Any]) -> None:
    chosen = [samples[2], text_samples[0], samples[0]]
    assert batch_of(chosen).prompts is None
    batch = batch_of(chosen, with_prompts=True)
    generation = batch_of(chosen, with_answer=False)
    for name in ("input_ids", "attention_mask", "token_types"):
        assert torch.equal(getattr(batch.prompts, name), getattr(generation, name))
    assert torch.equal(batch.prompts.grid_thw, generation.visuals.grid_thw)
    assert batch.prompts.order == tuple(range(len(generation.visuals.sizes)))
    assert torch.equal(batch.input_ids, batch_of(chosen).input_ids)


@pytest.mark.parametrize("with_answer", [True, False])
@pytest.mark.parametrize("visual", ["images", "video"])
def test_a_batch_without_frames_has_a_dummy_image(
    frontend: Any, batch_of: Any, text_samples: list[Any], visual: str, with_answer: bool
) -> None:
    """The dummy has 2 x 2 merged patches of 28 pixels, all gray; no sequence has a placeholder for it."""
    batch = batch_of(text_samples, with_answer, visual=visual)
    frames = {"images": 1, "video": 2}[visual]
    assert batch.visuals.dummy and batch.visuals.kind == {"images": "image", "video": "video"}[visual]
    assert batch.visuals.grid_thw.tolist() == [[1, 4, 4]]
    assert pixel_values(batch.visuals).shape == (16, 3 * 2 * 14 * 14)
    (geometry,) = batch.visuals.geometry_frames
    assert geometry.shape == (frames, 3, 56, 56) and geometry.dtype == torch.uint8 and (geometry == 128).all()
    mean, std = frontend.vision.image_mean, frontend.vision.image_std
    expected = torch.tensor([(128 / 255 - mean[c]) / std[c] for c in range(3)]).repeat_interleave(2 * 14 * 14)
    assert torch.allclose(pixel_values(batch.visuals), expected.expand(16, -1), atol=1e-6)
    assert not batch.token_types.any() and not (batch.input_ids == frontend.vision.image_token_id).any()
    assert batch.cam_to_world.shape == (2, 1, 4, 4) and batch.cam_to_world.isnan().all()
    assert batch.target_box[0].isnan().all() and not batch.target_box[1].isnan().any()
    if with_answer:
        positions = torch.arange(batch.input_ids.shape[1])
        for index, length in enumerate(batch.attention_mask.sum(1).tolist()):
            assert torch.equal(batch.position_ids[:, index, :length], positions[:length].expand(3, -1))


@pytest.mark.parametrize(("tower", "geometry", "side"), [(14, 14, 56), (16, 14, 70), (14, 16, 64), (14, 100, 100)])
def test_dummy_image_with_different_patch_sizes(frontend: Any, tower: int, geometry: int, side: int) -> None:
    """The tower gets a crop of the geometry encoder's image, and may need two frames at once."""
    vision = replace(frontend.vision, patch_size=tower, temporal_patch_size=3)
    spec = replace(frontend.geometry, patch_size=geometry)
    image, video = (dummy_visuals(kind, vision, spec, frontend.family) for kind in ("image", "video"))
    patches = side // (2 * tower) * 2
    for visuals, frames in ((image, 1), (video, 3)):
        assert visuals.grid_thw.tolist() == [[1, patches, patches]]
        assert pixel_values(visuals).shape == (patches**2, 3 * 3 * tower**2)
        assert visuals.geometry_frames[0].shape == (frames, 3, side, side)


@pytest.mark.parametrize("visual", ["images", "video"])
def test_samples_with_and_without_frames(
    frontend: Any, batch_of: Any, samples: list[Any], text_samples: list[Any], visual: str
) -> None:
    """Visuals, position ids and poses equal those of the samples with frames; position ids of a text start at 0."""
    chosen = [text_samples[0], samples[1], text_samples[1], samples[0]]
    batch, plain = batch_of(chosen, visual=visual), batch_of([samples[1], samples[0]], visual=visual)
    assert not batch.visuals.dummy and len(batch.visuals.geometry_frames) == 2
    for mixed, single in zip(batch.visuals.geometry_frames, plain.visuals.geometry_frames, strict=True):
        assert torch.equal(mixed, single)
    assert torch.equal(pixel_values(batch.visuals), pixel_values(plain.visuals))
    assert torch.equal(batch.visuals.grid_thw, plain.visuals.grid_thw)
    lengths = batch.attention_mask.sum(1).tolist()
    for index in (0, 2):
        counted = torch.arange(lengths[index]).expand(3, -1)
        assert torch.equal(batch.position_ids[:, index, : lengths[index]], counted)
        assert batch.cam_to_world[index].isnan().all()
    for there, here in [(1, 0), (3, 1)]:
        length = lengths[there]
        assert torch.equal(batch.position_ids[:, there, :length], plain.position_ids[:, here, :length])
        assert torch.equal(batch.cam_to_world[there].isnan(), plain.cam_to_world[here].isnan())
    assert batch.cam_to_world.shape == (4, 4, 4, 4)


def test_a_sample_is_eight_times_smaller_than_its_float_inputs(
    frontend: Any, data_config: Any, samples: list[Any], tmp_path: Path
) -> None:
    """All bytes of a batch, against those of its frames as float32 inputs of both encoders.

    The size is that of ScanNet's frames; the tensors besides the frames are small in comparison.
    """
    path = tmp_path / "frame.png"
    Image.new("RGB", (648, 484)).save(path)
    sample = replace(samples[0], frames=(path,) * 4)
    config = data_config(frame_width=518, max_length=4096)
    collate = make_collate(frontend, config)
    batch = collate([make_processor(frontend, config)(sample, with_answer=True)])
    tensors: list[torch.Tensor] = []
    map_tensors(batch, lambda tensor: tensors.append(tensor) or tensor)
    assert sum(tensor.dtype == torch.uint8 for tensor in tensors) == 1
    floats = pixel_values(batch.visuals).nbytes + sum(images.nbytes for images in geometry_images(batch.visuals))
    assert floats > 8 * sum(tensor.nbytes for tensor in tensors)


def test_the_frames_of_a_batch_reach_the_main_process_once(frontend: Any, data_config: Any, samples: list[Any]) -> None:
    """A loader process sends the tensor that both encoders share as one object."""
    chosen = [samples[0], replace(samples[0], id="again")]  # two frame sets of the same frames
    for batch in prompt_loader(chosen, frontend, data_config(workers=1), 2):
        visuals = batch.visuals
        assert len({id(frames) for frames in (*visuals.tower_frames, *visuals.geometry_frames)}) == 1


def test_video_positions_use_the_frame_rate(batch_of: Any, samples: list[Any]) -> None:
    slow, fast = (batch_of(samples[:1], visual="video", video_fps=fps) for fps in (0.5, 2.0))
    video = slow.token_types[0] == 2
    assert slow.visuals.grid_thw.tolist() == [[2, 2, 4]]
    # Frames per temporal patch / fps * position ids per second: 2 / 0.5 * 2 and 2 / 2 * 2.
    spans = [int(b.position_ids[0, 0, video].max() - b.position_ids[0, 0, video].min()) for b in (slow, fast)]
    assert spans == [8, 2]


def test_to_and_pin_memory_apply_to_every_tensor(
    batch_of: Any, samples: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = batch_of(samples[:2], with_prompts=True)
    moved = batch.to(torch.device("meta"))
    tensors = [moved.input_ids, moved.attention_mask, moved.token_types, moved.position_ids, moved.cam_to_world]
    tensors += [
        moved.visual_tokens,
        moved.frame_set_of_token,
        moved.frame_set_of_sample,
        moved.other_geometry.token,
        moved.other_geometry.exists,
        moved.layout.group,
        moved.layout.suffix,
    ]
    tensors += [moved.visuals.tower.positions, moved.visuals.tower.order]
    tensors += [moved.target_box, moved.visuals.grid_thw, *moved.visuals.geometry_frames]
    assert all(one is other for one, other in zip(moved.visuals.tower_frames, tensors[-2:], strict=True))
    for part in (moved.answer_positions, moved.description_positions, moved.prompts):
        tensors += [value for value in vars(part).values() if isinstance(value, torch.Tensor)]
    assert all(tensor.device.type == "meta" for tensor in tensors)
    assert moved.ids == batch.ids and moved.visuals.kind == "image" and type(moved) is type(batch)
    assert moved.layout.spans == batch.layout.spans and moved.visuals.sizes == batch.visuals.sizes
    assert moved.kinds == batch.kinds and moved.answers == batch.answers and moved.visuals.dummy is False
    pinned: list[torch.Tensor] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    again = batch.pin_memory()
    assert len(pinned) == len(tensors), "the frames, which both encoders share, once"
    assert torch.equal(again.input_ids, batch.input_ids)
