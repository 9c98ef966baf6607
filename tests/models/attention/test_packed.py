"""Packed attention: both functions against SDPA with an explicit mask."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from packed_batches import visible
from varlen_reference import flash_attn_package, torch_varlen_on_cpu
from w2r2_ds.models.attention.packed import PACKED, attention_inputs, segment_lengths, use_packed_attention
from w2r2_ds.models.weights.loading import load_vlm
from w2r2_ds.types.batch import Layout

SPANS = {
    "one sample": ((0, 9),),
    "equal suffixes": ((0, 7, 10, 13, 16),),
    "unequal suffixes": ((0, 7, 8, 15, 18),),
    "unrelated samples": ((0, 4), (4, 5), (5, 12)),
    "mixed": ((0, 5, 8, 9), (9, 13), (13, 14, 19, 20, 22)),
}


def layout_of(spans: tuple[tuple[int, ...], ...]) -> Layout:
    """The layout of one sequence."""
    group, suffix = [], []
    for number, (begin, *ends) in enumerate(spans):
        for part, end in enumerate(ends):
            group += [number] * (end - begin)
            suffix += [part] * (end - begin)
            begin = end
    return Layout(torch.tensor([group]), torch.tensor([suffix]), (spans,))


@pytest.fixture(params=["packed_sdpa", "packed_flash_attn"])
def function(request: pytest.FixtureRequest) -> Iterator[Callable[..., Any]]:
    """A registered attention function."""
    with flash_attn_package():
        yield AttentionInterface()[request.param]


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
@pytest.mark.parametrize("spans", SPANS.values(), ids=SPANS)
def test_outputs_and_gradients_equal_masked_attention(
    function: Callable[..., Any], spans: Any, heads: tuple[int, int]
) -> None:
    """float64: within 1e-12, where only the order of sums differs."""
    torch.manual_seed(0)
    length = spans[-1][-1]
    inputs = [
        torch.randn(1, h, length, 8, dtype=torch.float64, requires_grad=True) for h in (heads[0], *[heads[1]] * 2)
    ]
    weight = torch.randn(1, length, heads[0], 8, dtype=torch.float64)
    repeated = [each.repeat_interleave(heads[0] // each.shape[1], 1) for each in inputs]
    expected = scaled_dot_product_attention(*repeated, attn_mask=visible(layout_of(spans)), scale=0.3).transpose(1, 2)
    actual, weights = function(SimpleNamespace(), *inputs, None, scaling=0.3, packed_spans=spans, sliding_window=None)
    assert weights is None and actual.shape == expected.shape and actual.is_contiguous()
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    for mine, theirs in zip(
        torch.autograd.grad((actual * weight).sum(), inputs),
        torch.autograd.grad((expected * weight).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


def test_spans_exclude_a_mask(function: Callable[..., Any]) -> None:
    states = torch.randn(1, 2, 9, 8)
    with pytest.raises(AssertionError, match="neither a mask"):
        function(SimpleNamespace(), states, states, states, torch.ones(1, 1, 9, 9).bool(), packed_spans=((0, 9),))
    with pytest.raises(AssertionError, match="spans"):
        function(SimpleNamespace(), states, states, states, None, packed_spans=((0, 8),))


@pytest.fixture(scope="module")
def vlm(model_config: Any) -> Any:
    return load_vlm(model_config.vlm, torch.float32, "sdpa")


def test_model_with_spans_equals_the_model_with_a_mask(model_config: Any, vlm: Any) -> None:
    """The spans reach the function, no mask is made, and the vision tower's attention does not change."""
    layout = layout_of(SPANS["mixed"])
    ids = torch.randint(0, 60, layout.group.shape, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(ids.shape[1]).expand(3, 1, -1)
    with torch.no_grad():
        expected = vlm.model(input_ids=ids, position_ids=positions, attention_mask=visible(layout)).last_hidden_state
        split = load_vlm(model_config.vlm, torch.float32, "sdpa")
        use_packed_attention(split)
        use_packed_attention(split)  # idempotent
        given = attention_inputs(split, layout)
        assert given == {"attention_mask": None, "packed_spans": layout.spans[0]}
        actual = split.model(input_ids=ids, position_ids=positions, **given).last_hidden_state
        unpacked = vlm.model(input_ids=ids, position_ids=positions).last_hidden_state
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(unpacked, expected, rtol=1e-2, atol=1e-2)
    assert split.model.language_model.config._attn_implementation == "packed_sdpa"
    assert split.model.visual.config._attn_implementation == vlm.model.visual.config._attn_implementation


@pytest.mark.parametrize("left", [False, True])
def test_padded_batches_do_not_change(model_config: Any, vlm: Any, left: bool) -> None:
    ids = torch.randint(0, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, slice(0, 4) if left else slice(5, 9)] = 0
    split = load_vlm(model_config.vlm, torch.float32, "sdpa")
    use_packed_attention(split)
    with torch.no_grad():
        expected, actual = (model(input_ids=ids, attention_mask=mask).logits[mask == 1] for model in (vlm, split))
    assert torch.equal(actual, expected)


def test_unsupported_attention_raises(model_config: Any, vlm: Any) -> None:
    eager = load_vlm(model_config.vlm, torch.float32, "eager")
    with pytest.raises(ValueError, match=r"model\.attention is eager"):
        use_packed_attention(eager)
    packed = SimpleNamespace(layout=layout_of(SPANS["mixed"]))
    for model in (eager, vlm):
        with pytest.raises(AssertionError, match="use_packed_attention"):
            attention_inputs(model, packed.layout)


def test_every_packed_attention_is_registered() -> None:
    assert set(PACKED.values()) <= set(AttentionInterface().valid_keys())
    with torch_varlen_on_cpu() as calls:  # "packed_sdpa" uses PyTorch's varlen attention where it runs
        states = torch.randn(1, 2, 9, 8)
        AttentionInterface()["packed_sdpa"](SimpleNamespace(), *[states] * 3, None, packed_spans=((0, 5, 7, 9),))
    assert calls == [5], "one call, in which the longest segment has 5 tokens"


@pytest.mark.parametrize(
    ("spans", "lengths", "key_lengths"),
    [
        (((0, 9),), (9,), (9,)),
        (((0, 7, 8, 15),), (7, 1, 7), (7, 8, 14)),
        (((0, 5, 8, 9), (9, 13), (13, 14, 19)), (5, 3, 1, 4, 1, 5), (5, 8, 6, 4, 1, 6)),
    ],
)
def test_segments_of_spans(spans: Any, lengths: Any, key_lengths: Any) -> None:
    assert segment_lengths(spans) == (lengths, key_lengths)
