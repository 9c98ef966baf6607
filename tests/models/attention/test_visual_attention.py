"""Attention weights of answer positions against `output_attentions` of the stock model with eager attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from packed_batches import packed_of, questions, visible
from w2r2_ds.models.attention.selected_tokens import SelectedTokens
from w2r2_ds.models.attention.visual_attention import VisualAttention
from w2r2_ds.models.build import build_model, trainable
from w2r2_ds.models.family import find_family
from w2r2_ds.models.w2r2 import W2R2, embed_tokens, insert_visual_tokens

TOLERANCE = 1e-5
"""Absolute tolerance of a weight in [0, 1] in float32; the largest measured difference is below 1e-6."""


ROWS = 8
"""Rows of a block in these tests, so that the answers have several blocks."""


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("w2r2_ds.models.qwen2_5_vl.row_attention.BLOCK_ROWS", ROWS)


@pytest.fixture
def make_model(model_config: Any) -> Callable[[str], W2R2]:
    """Function `make_model(attention)`: the tiny model (4 query heads, 2 key heads) whose LoRA weights are not zero."""

    def make(attention: str) -> W2R2:
        model = build_model(replace(model_config, attention=attention), torch.device("cpu"), seed=1).eval()
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in trainable(model).values():
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        return model

    return make


def stock_weights(model: W2R2, batch: Any, mask: Tensor) -> list[Tensor]:
    """Per layer ``[heads, answer tokens, length]``: the rows of all weights that eager attention returns."""
    visual = model.encode_2d(batch.visuals)
    with torch.no_grad():
        every = model.family.language_model(model.base)(
            inputs_embeds=insert_visual_tokens(batch, embed_tokens(model.base, batch), visual),
            attention_mask=mask,
            position_ids=batch.position_ids,
            output_attentions=True,
            use_cache=False,
        ).attentions
    answer = batch.answer_positions
    return [weights[answer.sequence, :, answer.position].transpose(0, 1) for weights in every]


@torch.no_grad()
def own_weights(model: W2R2, batch: Any) -> list[Tensor]:
    """Per layer ``[heads, answer tokens, sequences * length]``, recorded in a pass with the model's own attention."""
    answer, found = batch.answer_positions, []
    selected = SelectedTokens.of(batch.layout, answer.sequence, answer.position)

    def record(index: int, layer: Any, hidden: Tensor, arguments: Any) -> None:
        assert index == len(found)
        blocks = list(model.family.row_attention(layer, selected, hidden, arguments))
        assert len(blocks) > 1 and max(block.shape[1] for block in blocks) == ROWS  # for any micro-batch
        found.append(torch.cat(blocks, dim=1))

    model.answer_hidden_states(batch, model.encode_2d(batch.visuals), on_input=record)
    return found


@pytest.fixture(params=["padded", "packed", "video"])
def batch_and_mask(request: Any, batch_of: Any, samples: list[Any], frontend: Any, data_config: Any) -> Any:
    """A padded batch with its mask; a packed one with shared frames, and its dense mask."""
    if request.param != "packed":
        batch = batch_of(samples, visual="video" if request.param == "video" else "images")
        return batch, batch.attention_mask
    shared = [*questions(samples[0], 2), *questions(samples[1], 1)]
    batch = packed_of(frontend, data_config)(shared, questions_per_scene=3)
    is_visible = visible(batch.layout)
    # A padding row attends to itself: the softmax of a row without keys is NaN.
    is_visible |= torch.eye(is_visible.shape[-1], dtype=torch.bool)
    return batch, torch.zeros(is_visible.shape).masked_fill(~is_visible, -torch.inf)


def test_weights_equal_those_of_eager_attention(make_model: Callable[[str], W2R2], batch_and_mask: Any) -> None:
    """Every layer and head, with M-RoPE, grouped queries and LoRA; 0 at tokens of other sequences."""
    batch, mask = batch_and_mask
    expected = stock_weights(make_model("eager"), batch, mask)
    model = make_model("sdpa")
    if len(batch.input_ids) == 1:
        model.family.use_packed_attention(model.base)
    actual = own_weights(model, batch)
    sequences, length = batch.input_ids.shape
    rows, sequence = torch.arange(len(batch.answer_positions.label)), batch.answer_positions.sequence
    assert len(actual) == len(expected) == 2
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == torch.float32 and ours.shape == (4, len(rows), sequences * length)
        by_sequence = ours.unflatten(-1, (sequences, length)).clone()
        own = by_sequence[:, rows, sequence]
        torch.testing.assert_close(own, theirs, rtol=0, atol=TOLERANCE)
        assert (own.std(-1) > 0).all()
        by_sequence[:, rows, sequence] = 0
        assert not by_sequence.any()


def test_maps_are_means_over_heads_and_where_tokens(make_model: Callable[[str], W2R2], batch_and_mask: Any) -> None:
    batch, _ = batch_and_mask
    model = make_model("sdpa")
    if len(batch.input_ids) == 1:
        model.family.use_packed_attention(model.base)
    recorder = VisualAttention(model.family, batch)
    model.answer_hidden_states(batch, model.encode_2d(batch.visuals), on_input=recorder)
    answer = batch.answer_positions
    for found, weights in zip(recorder.maps, own_weights(model, batch), strict=True):
        for sample in range(len(batch.ids)):
            own = (answer.sample == sample) & answer.where
            mean = weights[:, own].mean((0, 1))[batch.visual_tokens]
            torch.testing.assert_close(found[sample], mean, rtol=1e-5, atol=1e-7)
            other_frames = batch.frame_set_of_token != batch.frame_set_of_sample[sample]
            assert own.any() and 0 < found[sample].sum() < 1 and not found[sample][other_frames].any()
    torch.testing.assert_close(recorder.mean_map(), sum(recorder.maps) / 2)


def test_a_sample_without_where_tokens_has_no_map(
    make_model: Callable[[str], W2R2], batch_of: Any, samples: list[Any]
) -> None:
    batch, model = batch_of(samples[:2]), make_model("sdpa")
    where = batch.answer_positions.where & (batch.answer_positions.sample != 1)
    batch = replace(batch, optional_answer_positions=replace(batch.answer_positions, where=where))
    recorder = VisualAttention(model.family, batch)
    model.answer_hidden_states(batch, model.encode_2d(batch.visuals), on_input=recorder)
    assert recorder.mean_map()[0].any() and not recorder.mean_map()[1].any()


def test_layers_without_known_weights_are_an_error(
    make_model: Callable[[str], W2R2], batch_of: Any, samples: list[Any]
) -> None:
    """A sliding window, and a family that does not define the weights."""
    batch, model = batch_of(samples[:1]), make_model("sdpa")
    layers = model.family.language_model(model.base).layers
    layers[0].self_attn.sliding_window = 4
    with pytest.raises(ValueError, match="use_sliding_window"):
        model.answer_hidden_states(batch, model.encode_2d(batch.visuals), on_input=VisualAttention(model.family, batch))
    assert not any("forward" in vars(layer) for layer in layers), "the forwards are restored after an error"
    stock: Any = super(type(find_family("qwen2_5_vl")), model.family)
    with pytest.raises(ValueError, match="row_attention"):
        stock.row_attention(layers[0], None, torch.zeros(1, 1, 64), {})
