"""Packed sequences: the tokens of separate sequences, with shared prefixes once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from encoder_inputs import pixel_values
from packed_batches import packed_of, questions
from w2r2_ds.config.io import DEMO_RECIPE, load_config
from w2r2_ds.data.batching.packing import groups_by_frames, packed_layout, separate_groups
from w2r2_ds.data.dataset import check_frames_are_shared
from w2r2_ds.data.loader import make_collate, make_processor


@pytest.fixture(scope="module")
def pack(frontend: Any, data_config: Any) -> Callable[..., Any]:
    return packed_of(frontend, data_config)


def tokens_of(batch: Any, index: int) -> torch.Tensor:
    """Positions of a sample's tokens in the packed sequence, computed from the layout only."""
    row = int((batch.answer_positions.sample == index).nonzero()[-1])
    last = int(batch.answer_positions.position[row])
    group, suffix = batch.layout.group[0], batch.layout.suffix[0]
    mine = (group == group[last]) & ((suffix == 0) | (suffix == suffix[last]))
    return mine.nonzero().squeeze(-1)


@pytest.mark.parametrize("visual", ["images", "video"])
@pytest.mark.parametrize("questions_per_scene", [1, 3, 8])
def test_packed_samples_equal_separate_ones(
    pack: Callable[..., Any],
    batch_of: Any,
    samples: list[Any],
    text_samples: list[Any],
    caption_sample: Any,
    questions_per_scene: int,
    visual: str,
) -> None:
    """Tokens, types, answer positions and digits.

    Questions of two scenes alternate; a text, a caption and a repeated sample.
    """
    first, second = questions(samples[0], 3), questions(samples[1], 2)
    chosen = [first[0], second[0], first[1], text_samples[0], second[1], first[2], caption_sample, first[1]]
    batch = pack(chosen, questions_per_scene=questions_per_scene, packing=True, visual=visual)
    assert batch.input_ids.shape[0] == 1 and batch.attention_mask.all()
    assert len(batch.layout.spans[0]) == (8 if questions_per_scene == 1 else 3)
    assert batch.layout.spans[0][-1][-1] == batch.input_ids.shape[1]
    for index, sample in enumerate(chosen):
        single = batch_of([sample], visual=visual)
        at = tokens_of(batch, index)
        for name in ("input_ids", "token_types"):
            assert torch.equal(getattr(batch, name)[0, at], getattr(single, name)[0])
        assert torch.equal(batch.position_ids[:, 0, at], single.position_ids[:, 0])
        for name in ("answer_positions", "description_positions"):
            mine = getattr(batch, name).sample == index
            assert torch.equal(getattr(batch, name).position[mine], at[getattr(single, name).position])
        mine = batch.answer_positions.sample == index
        assert torch.equal(batch.answer_positions.label[mine], single.answer_positions.label)
    separate = batch_of(chosen, visual=visual)
    for name in ("label", "where", "digit", "place_value", "sign", "sample"):
        assert torch.equal(getattr(batch.answer_positions, name), getattr(separate.answer_positions, name))
    assert not batch.answer_positions.sequence.any() and not batch.description_positions.sequence.any()


@pytest.mark.parametrize("visual", ["images", "video"])
def test_shared_frames_are_encoded_once(
    pack: Callable[..., Any], samples: list[Any], text_samples: list[Any], visual: str
) -> None:
    first, second = questions(samples[0], 3), questions(samples[1], 2)
    chosen = [first[0], second[0], text_samples[0], first[1], second[1], first[2]]
    batch = pack(chosen, questions_per_scene=2, visual=visual)
    distinct = pack([first[0], second[0]], visual=visual)
    assert batch.visuals.ids == (first[0].id, second[0].id) and batch.visuals.sizes == distinct.visuals.sizes
    assert torch.equal(pixel_values(batch.visuals), pixel_values(distinct.visuals))
    assert torch.equal(batch.visuals.grid_thw, distinct.visuals.grid_thw)
    assert len(batch.visuals.geometry_frames) == 2
    assert (batch.token_types.flatten()[batch.visual_tokens] > 0).all()
    assert len(batch.visual_tokens) == sum(batch.visuals.sizes) == int((batch.token_types > 0).sum())
    assert batch.frame_set_of_sample.tolist() == [0, 1, -1, 0, 1, 0]
    assert torch.equal(batch.frame_set_of_token, distinct.token_types.nonzero()[:, 0])
    assert (batch.layout.suffix.flatten()[batch.visual_tokens] == 0).all()


@pytest.mark.parametrize("visual", ["images", "video"])
def test_prompts_are_not_packed(
    pack: Callable[..., Any], samples: list[Any], text_samples: list[Any], visual: str
) -> None:
    first, second = questions(samples[0], 2), questions(samples[1], 1)
    chosen = [first[0], text_samples[0], second[0], first[1]]
    batch = pack(chosen, with_prompts=True, questions_per_scene=4, visual=visual)
    expected = pack(chosen, with_prompts=True, visual=visual)
    for name in ("input_ids", "attention_mask", "token_types", "grid_thw"):
        assert torch.equal(getattr(batch.prompts, name), getattr(expected.prompts, name))
    sizes = [batch.visuals.sizes[entry] for entry in batch.prompts.order]
    assert tuple(sizes) == expected.visuals.sizes
    counts = [2, 2, 2] if visual == "video" else [4, 3, 4]
    first_set, second_set = range(counts[0]), range(counts[0], counts[0] + counts[1])
    assert batch.prompts.order == (*first_set, *second_set, *first_set)


def test_the_last_prompt_token_stays_in_the_suffix(frontend: Any, data_config: Any, samples: list[Any]) -> None:
    """Two equal questions share everything except the prompt's last token and the answer."""
    processor = make_processor(frontend, data_config())
    twice = [processor(samples[0], True)] * 2
    (group,) = groups_by_frames(twice)
    assert group.prefix_length == len(twice[0].input_ids) - twice[0].num_answer_tokens - 1
    layout, placements = packed_layout([group], twice)
    assert layout.spans[0][0] == (
        0,
        group.prefix_length,
        *(group.prefix_length + n * (twice[0].num_answer_tokens + 1) for n in (1, 2)),
    )
    assert [placement.suffix_start for placement in placements] == list(layout.spans[0][0][1:3])
    assert [each.prefix_length for each in separate_groups(twice)] == [len(twice[0].input_ids)] * 2


def test_frames_after_the_question_raise(frontend: Any, data_config: Any, samples: list[Any]) -> None:
    processor = make_processor(frontend, data_config())
    pair = [processor(sample, True) for sample in questions(samples[0], 2)]
    turned = [replace(each, input_ids=each.input_ids.flip(0), token_types=each.token_types.flip(0)) for each in pair]
    with pytest.raises(ValueError, match="before the last frame"):
        groups_by_frames(turned)
    with pytest.raises(ValueError, match="before the last frame"):
        make_collate(frontend, data_config(questions_per_scene=2), False)(turned)


def test_shared_frames_of_consecutive_samples_are_read_once(
    frontend: Any, data_config: Any, samples: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Any] = []
    processor = make_processor(frontend, data_config())
    original = processor.preprocess.compute
    monkeypatch.setattr(processor.preprocess, "compute", lambda sample: read.append(sample.id) or original(sample))
    first, second = questions(samples[0], 2), questions(samples[1], 2)
    for sample in [*first, *second, first[0]]:
        processor(sample, True)
    assert read == [first[0].id, second[0].id, first[0].id]


def test_incompatible_options_are_rejected() -> None:
    def rejected(*options: str) -> str:
        with pytest.raises(ValueError) as error:
            load_config(DEMO_RECIPE, list(options))
        return str(error.value)

    unequal = rejected("--data.questions_per_scene", "4", "--train.micro_batch", "6")
    assert "train.micro_batch is 6" in unequal and "data.questions_per_scene 4" in unequal
    masked = ["--data.questions_per_scene", "2", "--train.micro_batch", "2", "--objective.visual_mask_ratio", "0.1"]
    assert "objective.visual_mask_ratio" in rejected(*masked)
    assert "data.questions_per_scene" in rejected("--data.questions_per_scene", "0")


def test_frames_drawn_for_every_sample_are_rejected(tmp_path: Any) -> None:
    from w2r2_ds.data.prepared_set import PreparedSet

    drawn = object.__new__(PreparedSet)
    drawn.folder, drawn.manifest = tmp_path, {"options": {"frames": {"protocol": "vgllm"}}}
    mixture: Any = type("Mixture", (), {"sets": [drawn]})
    check_frames_are_shared(mixture, 1)
    with pytest.raises(ValueError, match=r"manifest\.json: frames\.protocol is vgllm"):
        check_frames_are_shared(mixture, 2)
