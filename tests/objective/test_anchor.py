"""Attention patterns made by hand: known anchor, known box, known s."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from anchor_batches import FOCAL, TYPICAL, anchored, attention_at
from host_sync import host_constants, host_reads
from objectives import objective_config
from packed_batches import questions
from w2r2_ds.boxes3d.iou import box_iou
from w2r2_ds.objective.anchor import anchor_similarity, find_anchors
from w2r2_ds.objective.scorer import Scorer


@pytest.fixture
def anchored_batch(frontend: Any, data_config: Any) -> Callable[..., Any]:
    return anchored(frontend, data_config)


def tokens_of(batch: Any, sample: int) -> torch.Tensor:
    """Indices of the visual tokens of a sample."""
    return (batch.frame_set_of_token == batch.frame_set_of_sample[sample]).nonzero()[:, 0]


def test_anchor_and_box_of_a_known_token(anchored_batch: Callable[..., Any], samples: list[Any]) -> None:
    """Frames of 80 x 60 pixels become 56 x 42: 2 x 1 tokens of 28 pixels, which are 40 pixels of the file."""
    batch = anchored_batch(samples[:1])
    right_of_frame_2 = int(tokens_of(batch, 0)[5])
    anchors = find_anchors(attention_at(batch, [right_of_frame_2]), batch)
    assert anchors.token.tolist() == [right_of_frame_2] and anchors.frame.tolist() == [2] and anchors.valid.all()
    # Token centre (41.5, 13.5) of 56 x 42 is (59.5, 19.5) of 80 x 60, whose middle is (39.5, 29.5).
    ray = np.array([20.0 / FOCAL, -10.0 / FOCAL, 1.0])
    pose = samples[0].cam_to_world[2]
    center = pose[:3, :3] @ (TYPICAL.depth * ray) + pose[:3, 3]
    np.testing.assert_allclose(anchors.center[0].numpy(), center, atol=1e-12)
    np.testing.assert_allclose(anchors.size[0].numpy(), TYPICAL.class_sizes[17])


def test_s_is_the_overlap_of_the_anchored_box(anchored_batch: Callable[..., Any], samples: list[Any]) -> None:
    """A target at the anchor, of typical size, has s 1; one that is moved by half its width has s 1/3."""
    batch = anchored_batch(samples[:2])
    attention = attention_at(batch, [int(tokens_of(batch, 0)[3]), int(tokens_of(batch, 1)[1])])
    anchors = find_anchors(attention, batch)
    target = torch.cat([anchors.center, anchors.size, torch.zeros(2, 3)], dim=-1)
    target[1, 0] += target[1, 3] / 2
    s, valid = anchor_similarity(attention, replace(batch, target_box=target))
    assert valid.all()
    torch.testing.assert_close(s, torch.tensor([1.0, 1 / 3], dtype=torch.float64))
    # And of the fixture's own target, which is neither.
    s, _ = anchor_similarity(attention, batch)
    box = torch.cat([anchors.center, anchors.size, torch.zeros(2, 3)], dim=-1)
    torch.testing.assert_close(s, box_iou(box, batch.target_box))
    assert (s < 1 / 3).all()


def test_the_highest_attention_counts_not_its_centre_of_mass(
    anchored_batch: Callable[..., Any], samples: list[Any]
) -> None:
    batch = anchored_batch(samples[:1])
    attention = torch.tensor([[0.3, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.4]])
    assert find_anchors(attention, batch).token.tolist() == [7]


def test_packed_samples_share_tokens_but_not_those_of_other_frames(
    anchored_batch: Callable[..., Any], samples: list[Any]
) -> None:
    """Attention to another sample's frames, which only a wrong mask could cause, never becomes the anchor."""
    packed = [*questions(samples[0], 2), *questions(samples[1], 1)]
    batch = anchored_batch(packed, questions_per_scene=3)
    assert len(batch.input_ids) == 1 and len(batch.visual_tokens) == 8 + 3 * 4
    attention = attention_at(batch, [1, 6, 11])
    attention[0, 15] = attention[2, 0] = 0.9
    anchors = find_anchors(attention, batch)
    assert anchors.token.tolist() == [1, 6, 11] and anchors.frame.tolist() == [0, 3, 0]


def test_answers_without_an_anchored_box_are_invalid(
    anchored_batch: Callable[..., Any], samples: list[Any], caption_sample: Any, text_samples: list[Any]
) -> None:
    """A caption, a sample without frames, one without attention, and one without a pose."""
    lost = replace(samples[0], id="lost", cam_to_world=samples[0].cam_to_world.copy())
    lost.cam_to_world[1] = np.nan
    batch = anchored_batch([samples[0], caption_sample, text_samples[1], samples[2], lost])
    first = int(tokens_of(batch, 0)[0])
    attention = attention_at(batch, [first, int(tokens_of(batch, 1)[0]), 0, 0, int(tokens_of(batch, 4)[2])])
    attention[3] = 0
    s, valid = anchor_similarity(attention, batch)
    assert valid.tolist() == [True, False, False, False, False] and not s[1:].any() and s.isfinite().all()
    no_frames = anchored_batch([text_samples[1]])
    s, valid = anchor_similarity(torch.zeros(1, 0), no_frames)
    assert s.tolist() == [0] and not valid.any()


def test_texts_are_scored_as_teacher_forced(
    anchored_batch: Callable[..., Any],
    samples: list[Any],
    caption_sample: Any,
    answer_sample: Any,
    frontend: Any,
    tables: Any,
) -> None:
    batch = anchored_batch([samples[0], caption_sample, answer_sample])
    scorer = Scorer(tables, frontend.tokenizer, objective_config())
    attention = attention_at(batch, [0, 8, 20])
    label = batch.answer_positions.label
    score = scorer.anchored(attention, label, batch)
    assert score.s[1:].tolist() == [1, 1] and score.valid.all()
    assert score.s[0] == anchor_similarity(attention, batch)[0][0] < scorer.teacher_forced(label, batch).s[0]


def test_no_host_sync_and_no_gradient(anchored_batch: Callable[..., Any], samples: list[Any]) -> None:
    batch = anchored_batch(samples)
    attention = attention_at(batch, [0, 9, 15]).requires_grad_()
    assert not host_reads(lambda: anchor_similarity(attention, batch))
    assert not host_constants(lambda: anchor_similarity(attention, batch))
    assert not anchor_similarity(attention, batch)[0].requires_grad
