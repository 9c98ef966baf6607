"""Packed attention: both functions against SDPA with an explicit mask."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from packed_batches import visible
from w2r2_ds.models.loading import load_vlm
from w2r2_ds.models.qwen2_5_vl import packed_attention
from w2r2_ds.models.qwen2_5_vl.packed_attention import PACKED, attention_inputs, use_packed_attention
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


def documented_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
) -> torch.Tensor:
    """`flash_attn_varlen_func` as documented by flash-attn 2, in PyTorch.

    Packed tokens, int32 cumulative lengths, fewer key heads than query heads, causal mask aligned to the bottom right.
    """
    assert q.ndim == k.ndim == v.ndim == 3 and cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert causal and not dropout_p and all(each.is_contiguous() for each in (q, k, v))
    assert cu_seqlens_q[0] == cu_seqlens_k[0] == 0
    assert cu_seqlens_q[-1] == len(q) and cu_seqlens_k[-1] == len(k) and len(cu_seqlens_q) == len(cu_seqlens_k)
    assert max_seqlen_q == cu_seqlens_q.diff().max() and max_seqlen_k == cu_seqlens_k.diff().max()
    results = []
    for (first, last), (begin, end) in zip(
        zip(cu_seqlens_q.tolist(), cu_seqlens_q[1:].tolist(), strict=False),
        zip(cu_seqlens_k.tolist(), cu_seqlens_k[1:].tolist(), strict=False),
        strict=True,
    ):
        queries, keys = last - first, end - begin
        mask = torch.arange(keys) <= torch.arange(queries)[:, None] + keys - queries
        heads = q.shape[1] // k.shape[1]
        key, value = (each[begin:end].repeat_interleave(heads, 1).transpose(0, 1) for each in (k, v))
        query = q[first:last].transpose(0, 1)
        results.append(
            scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=softmax_scale).transpose(0, 1)
        )
    return torch.cat(results)


@pytest.fixture
def flash_attn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package flash_attn that has this function only."""
    module = ModuleType("flash_attn")
    module.flash_attn_varlen_func = documented_varlen  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", module)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
@pytest.mark.parametrize("spans", SPANS.values(), ids=SPANS)
@pytest.mark.parametrize("function", [packed_attention.packed_sdpa, packed_attention.packed_varlen])
def test_outputs_and_gradients_equal_masked_attention(
    flash_attn: None, function: Callable[..., Any], spans: Any, heads: tuple[int, int]
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


@pytest.mark.parametrize("function", [packed_attention.packed_sdpa, packed_attention.packed_varlen])
def test_spans_exclude_a_mask(flash_attn: None, function: Callable[..., Any]) -> None:
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
    assert split.model.visual.config._attn_implementation == "sdpa"


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
    # Without the package: transformers may have taken flash-attn from the hub.
    named = SimpleNamespace(model=SimpleNamespace(language_model=SimpleNamespace(config=SimpleNamespace())))
    named.model.language_model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="flash-attn itself"):
        use_packed_attention(named)


def test_cumulative_lengths_are_cached() -> None:
    assert packed_attention._ends((3, 1), torch.device("cpu")).tolist() == [0, 3, 4]
    assert packed_attention._ends((3, 1), torch.device("cpu")) is packed_attention._ends((3, 1), torch.device("cpu"))
    assert set(PACKED.values()) == {"packed_sdpa", "packed_varlen"}
