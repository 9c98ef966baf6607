"""Pairs of frame sets of different rooms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from packed_batches import packed_of, questions
from two_scenes import two_scenes
from w2r2_ds.data.batching.scene_pairs import check_two_rooms, next_of_another_room


@pytest.mark.parametrize(
    ("rooms", "grids", "expected"),
    [
        ("", "", []),
        ("a", "x", [-1]),
        ("aa", "xx", [-1, -1]),
        ("ab", "xx", [1, 0]),
        ("ab", "xy", [-1, -1]),
        ("aab", "xxx", [2, 2, 0]),  # not the next one, which is of the same room
        ("abc", "xyx", [2, -1, 0]),
        ("abcb", "xxxx", [1, 2, 3, 0]),
    ],
)
def test_the_next_frame_set_of_another_room(rooms: str, grids: str, expected: list[int]) -> None:
    assert next_of_another_room(rooms, grids) == expected


def counterparts(batch: Any) -> list[Any]:
    """Per visual token: the frame set of its counterpart, and the indices of both in their frame sets; or None."""
    owner, index = batch.frame_set_of_token.tolist(), batch.other_geometry.token.tolist()
    first = [owner.index(each) for each in range(max(owner) + 1)]
    return [
        None if other < 0 else (owner[other], other - first[owner[other]], token - first[owner[token]])
        for token, other in enumerate(index)
    ]


def test_scans_of_one_room_are_not_paired(batch_of: Any, samples: list[Any]) -> None:
    """The third frame set is another scan of the first one's room, the fourth a scan of another room."""
    first, _, second = two_scenes(samples)
    again = replace(second, scene_id="scene0000_01")
    assert batch_of([first, again]).other_geometry.exists.tolist() == [False, False]
    batch = batch_of([first, again, second])
    assert batch.other_geometry.exists.tolist() == [True, True, True]
    owners = [pair[0] for pair in counterparts(batch)]
    size = len(owners) // 3
    assert owners == [*[2] * size, *[2] * size, *[0] * size]


@pytest.mark.parametrize("visual", ["images", "video"])
def test_every_token_has_the_token_at_its_place(
    batch_of: Any, samples: list[Any], text_samples: list[Any], visual: str
) -> None:
    first, third, second = two_scenes(samples)
    batch = batch_of([first, text_samples[0], third, second], visual=visual)
    assert batch.other_geometry.exists.tolist() == [True, False, False, True]
    size = int((batch.frame_set_of_token == 0).sum())
    others = int((batch.frame_set_of_token == 1).sum())
    assert size > 1 and others > 1
    assert counterparts(batch) == [
        *((2, place, place) for place in range(size)),
        *([None] * others),
        *((0, place, place) for place in range(size)),
    ]


def test_packed_samples_have_the_pair_of_their_frame_set(
    frontend: Any, data_config: Callable[..., Any], samples: list[Any]
) -> None:
    first, _, second = two_scenes(samples)
    batch = packed_of(frontend, data_config)([*questions(first, 2), *questions(second, 2)], questions_per_scene=2)
    assert batch.other_geometry.exists.tolist() == [True] * 4
    assert {pair[0] for pair in counterparts(batch)} == {0, 1}


def test_batches_without_pairs(batch_of: Any, samples: list[Any], text_samples: list[Any]) -> None:
    """One scene; no frames; and a batch for generation, which has none of the fields of training."""
    alone = batch_of(samples).other_geometry
    assert not alone.exists.any() and (alone.token == -1).all() and len(alone.token) > 0
    text = batch_of(text_samples).other_geometry
    assert text.exists.tolist() == [False, False] and text.token.shape == (0,) and text.token.dtype == torch.int64
    assert batch_of(samples, with_answer=False).other_geometry is None


def test_two_rooms_with_frames_are_required(samples: list[Any], text_samples: list[Any]) -> None:
    """Another scan of the same room is none, nor is a question without frames."""
    check_two_rooms(two_scenes(samples), "objective.push_term contrast")
    elsewhere, again = replace(text_samples[0], scene_id="scene0001_00"), replace(samples[0], scene_id="scene0000_01")
    with pytest.raises(ValueError, match=r"objective\.push_term contrast.*data\.train has 1 room"):
        check_two_rooms([*samples, elsewhere, again], "objective.push_term contrast")
