"""Conditions of an evaluation: no_image has gray frames and the same prompt; the command line has all names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args, get_type_hints

import pytest
import torch

from w2r2_ds.commands.evaluate import run
from w2r2_ds.data.batching.collate import GRAY
from w2r2_ds.data.loader import make_processor
from w2r2_ds.evaluation.conditions import CONDITIONS, find_condition


def test_no_image_changes_the_pixels_only(
    samples: list[Any], text_samples: list[Any], frontend: Any, data_config: Callable[..., Any]
) -> None:
    plain = make_processor(frontend, data_config())
    condition = find_condition("no_image")
    assert condition.geometry == "zero" and condition.processor is not None
    gray = condition.processor(plain, frontend.geometry, samples)
    for sample in samples:
        seen, blind = plain(sample, False), gray(sample, False)
        for field in ("input_ids", "token_types", "what"):
            assert torch.equal(getattr(seen, field), getattr(blind, field)), field
        assert torch.equal(seen.visual.grid_thw, blind.visual.grid_thw)
        assert blind.visual.tower_frames.shape == seen.visual.tower_frames.shape
        assert blind.visual.tower_frames.unique().tolist() == [GRAY]
        assert len(seen.visual.tower_frames.unique()) > 100, "the sample's own frames are unchanged"
        assert torch.equal(blind.visual.geometry_frames, seen.visual.geometry_frames)
    assert gray(text_samples[0], False).visual.tower_frames is None


def test_the_command_line_has_all_conditions() -> None:
    assert get_args(get_type_hints(run)["geometry"]) == tuple(CONDITIONS)
    with pytest.raises(ValueError, match="none"):
        find_condition("none")
