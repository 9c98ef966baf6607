"""Rows point at the right labels, whatever the batch is made of."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from w2r2_ds.data.slots import NUMBERS


@pytest.mark.parametrize("visual", ["images", "video"])
def test_rows_point_at_the_answers(front: Any, batch_of: Any, samples: list[Any], visual: str) -> None:
    batch = batch_of(samples, visual=visual)
    rows = batch.answer_rows
    assert torch.equal(batch.input_ids[rows.sample, rows.position + 1], rows.label)
    assert batch.attention_mask[rows.sample, rows.position + 1].all()
    for index, sample in enumerate(samples):
        mine = rows.sample == index
        assert front.tokenizer.decode(rows.label[mine]) == sample.answer + "<|im_end|>"
        before = batch.input_ids[index, int(rows.position[mine][0])]
        assert front.tokenizer.decode(before) == "\n"  # the last token of the prompt predicts the first of the answer


def test_slots_point_at_the_digits(front: Any, batch_of: Any, samples: list[Any]) -> None:
    batch = batch_of(samples)
    rows = batch.answer_rows
    tokens = front.tokenizer.convert_ids_to_tokens(rows.label.tolist())
    seen = torch.zeros_like(rows.where)
    for index in range(len(samples)):
        numbers = []
        for number in range(NUMBERS):
            at = rows.number[index, number]
            at = at[at >= 0]
            assert (rows.sample[at] == index).all() and rows.sample[rows.lead[index, number]] == index
            text = "".join(tokens[i] for i in at)
            sign = -1 if tokens[rows.lead[index, number]].endswith("-") else 1
            numbers.append(sign * float(text))
            value = sum(int(tokens[i]) * p for i, p in zip(at, rows.place[index, number], strict=False) if p > 0)
            assert sign * value == pytest.approx(numbers[-1])
            seen[at[rows.place[index, number, : len(at)] > 0]] = True
        text = samples[index].answer
        expected = [int(text.split('"frame": ')[1].split(",")[0])]
        expected += [float(part) for part in text.split("[")[1].split("]")[0].split(",")]
        assert numbers == expected
    assert torch.equal(seen, rows.where)
    assert (rows.place[rows.number < 0] == 0).all()


def test_right_padding_for_training(front: Any, batch_of: Any, samples: list[Any]) -> None:
    batch = batch_of(samples)
    lengths = batch.attention_mask.sum(1)
    assert len(set(lengths.tolist())) == 3 and lengths.max() == batch.input_ids.shape[1]
    for index, sample in enumerate(samples):
        alone = batch_of([sample])
        length = int(lengths[index])
        assert torch.equal(batch.input_ids[index, :length], alone.input_ids[0])
        assert (batch.input_ids[index, length:] == front.tokenizer.pad_token_id).all()
        assert (batch.token_types[index, length:] == 0).all()
        assert torch.equal(batch.position_ids[:, index, :length], alone.position_ids[:, 0])


def test_left_padding_for_generation(front: Any, batch_of: Any, samples: list[Any]) -> None:
    batch = batch_of(samples, with_answer=False)
    assert batch.position_ids is None and batch.rows is None
    assert batch.attention_mask[:, -1].all() and (batch.attention_mask.diff(dim=1) >= 0).all()
    for index, sample in enumerate(samples):
        alone = batch_of([sample], with_answer=False)
        kept = batch.attention_mask[index].bool()
        assert torch.equal(batch.input_ids[index][kept], alone.input_ids[0])
    with pytest.raises(AssertionError, match="no answer rows"):
        _ = batch.answer_rows


def test_visuals_poses_and_targets(batch_of: Any, samples: list[Any]) -> None:
    batch = batch_of(samples)
    assert batch.visuals.kind == "image"
    assert batch.visuals.grid_thw.tolist() == [[1, 2, 4]] * 4 + [[1, 4, 4]] * 3 + [[1, 2, 4]] * 12
    assert batch.visuals.pixel_values.shape[0] == int(batch.visuals.grid_thw.prod(-1).sum())
    assert [len(images) for images in batch.visuals.geometry_images] == [4, 3, 12]
    assert batch.cam_to_world.shape == (3, 12, 4, 4) and batch.cam_to_world.dtype == torch.float64
    for index, sample in enumerate(samples):
        count = len(sample.frames)
        assert (batch.cam_to_world[index, :count].numpy() == sample.cam_to_world).all()
        assert batch.cam_to_world[index, count:].isnan().all()  # no answer may name these
    assert (batch.target_box.numpy() == samples[0].target.box).all()


def test_video_positions_use_the_frame_rate(batch_of: Any, samples: list[Any]) -> None:
    slow, fast = (batch_of(samples[:1], visual="video", video_fps=fps) for fps in (0.5, 2.0))
    video = slow.token_types[0] == 2
    assert slow.visuals.grid_thw.tolist() == [[2, 2, 4]]
    # Two frames to a row of tokens and two positions to a second: 2 / 0.5 * 2 and 2 / 2 * 2.
    spans = [int(b.position_ids[0, 0, video].max() - b.position_ids[0, 0, video].min()) for b in (slow, fast)]
    assert spans == [8, 2]


def test_to_and_pin_reach_every_tensor(batch_of: Any, samples: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    batch = batch_of(samples[:2])
    moved = batch.to(torch.device("meta"))
    tensors = [moved.input_ids, moved.attention_mask, moved.token_types, moved.position_ids, moved.cam_to_world]
    tensors += [moved.target_box, moved.visuals.pixel_values, moved.visuals.grid_thw, *moved.visuals.geometry_images]
    tensors += list(vars(moved.answer_rows).values())
    assert all(tensor.device.type == "meta" for tensor in tensors)
    assert moved.ids == batch.ids and moved.visuals.kind == "image" and type(moved) is type(batch)
    pinned: list[torch.Tensor] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    again = batch.pin_memory()
    assert len(pinned) == len(tensors) and torch.equal(again.input_ids, batch.input_ids)
