"""Attention of the language model: against SDPA with an explicit mask, and without tensors of length ** 2 elements."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

from w2r2_ds.models.attention import causal_sdpa as attention
from w2r2_ds.models.attention.causal_sdpa import (
    CAUSAL_SDPA,
    causal_mask,
    causal_sdpa,
    has_fused_gqa,
    use_causal_sdpa,
)
from w2r2_ds.models.attention.vision import VISION_ATTENTION
from w2r2_ds.models.build import build_model
from w2r2_ds.models.weights.loading import load_vlm

HEADS, KEY_HEADS, LENGTH, SIZE = 4, 2, 9, 8


def states(dtype: torch.dtype = torch.float64, queries: int = LENGTH, batch: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, HEADS, queries, SIZE), *[(batch, KEY_HEADS, LENGTH, SIZE)] * 2]
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def reference(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    key, value = (each.repeat_interleave(HEADS // KEY_HEADS, 1) for each in (key, value))
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.3).transpose(1, 2)


class PairwiseTensors(TorchDispatchMode):
    """Operators that return a tensor with two dimensions of `length` or more, such as a mask or attention scores."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length, self.operators = length, set[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(each, torch.Tensor) and sum(size >= self.length for size in each.shape) > 1:
                self.operators.add(str(func))
        return result


@pytest.mark.parametrize("padding", [None, [0, 4, 7]])
def test_outputs_and_gradients_equal_masked_attention(padding: list[int] | None) -> None:
    """float64: within 1e-12, where only the order of sums differs. The outputs of padding are 0."""
    inputs = states()
    mask = torch.ones(3, 1, LENGTH, LENGTH, dtype=torch.bool).tril()
    for index, count in enumerate(padding or []):
        mask[index, :, :, :count] = False
        mask[index, :, :count, 0] = True  # a row without keys would be NaN
    is_token = torch.stack([torch.arange(LENGTH) >= count for count in padding or [0] * 3])[:, :, None, None]
    expected = reference(*inputs, mask) * is_token
    given = None if padding is None else torch.tensor(padding)
    actual, weights = causal_sdpa(torch.nn.Module(), *inputs, given, scaling=0.3)
    assert weights is None and actual.is_contiguous() and actual.shape == (3, LENGTH, HEADS, SIZE)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    factor = torch.randn(actual.shape, dtype=actual.dtype)
    for mine, theirs in zip(
        torch.autograd.grad((actual * factor).sum(), inputs),
        torch.autograd.grad((expected * factor).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


def test_a_decoded_token_attends_to_all_keys() -> None:
    inputs = states(queries=1)
    actual, _ = causal_sdpa(torch.nn.Module(), *inputs, None, scaling=0.3)
    torch.testing.assert_close(actual, reference(*inputs, None), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("device", "dtype", "fused"),
    [
        ("cuda", torch.bfloat16, True),
        ("cuda", torch.float16, True),
        ("cuda", torch.float32, False),
        ("cpu", torch.float32, True),
    ],
)
@pytest.mark.parametrize("queries", [LENGTH, 1])
def test_grouped_heads_reach_sdpa_only_where_a_fused_kernel_takes_them(
    monkeypatch: pytest.MonkeyPatch, device: str, dtype: torch.dtype, fused: bool, queries: int
) -> None:
    assert has_fused_gqa(device, dtype) == fused
    calls: list[tuple[int, int, bool]] = []

    def recorded(query: Any, key: Any, value: Any, enable_gqa: bool = False, **options: Any) -> Any:
        calls.append((query.shape[1], key.shape[1], enable_gqa))
        return scaled_dot_product_attention(query, key, value, enable_gqa=enable_gqa, **options)

    monkeypatch.setattr(attention, "scaled_dot_product_attention", recorded)
    monkeypatch.setattr(attention, "has_fused_gqa", lambda *_: has_fused_gqa(device, dtype))
    causal_sdpa(torch.nn.Module(), *states(dtype, queries), None)
    ((query_heads, key_heads, enable_gqa),) = calls
    assert enable_gqa == (fused and queries > 1) and (query_heads == key_heads) == (not enable_gqa)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("queries", [1, 256])
def test_float32_on_a_gpu_allocates_no_scores(queries: int) -> None:
    """Neither in the forward nor in the backward pass."""
    shapes = [(1, HEADS, queries, 64), *[(1, KEY_HEADS, 256, 64)] * 2]
    inputs = [torch.randn(shape, device="cuda", requires_grad=True) for shape in shapes]
    with PairwiseTensors(256) as found:
        output, _ = causal_sdpa(torch.nn.Module(), *inputs, None)
        torch.autograd.grad(output.sum(), inputs)
    assert not found.operators


def mask_of(is_token: torch.Tensor, queries: int, function: Any = causal_mask_function) -> torch.Tensor | None:
    batch, keys = is_token.shape
    window = {} if function is causal_mask_function else {"local_size": 4}
    return causal_mask(
        batch_size=batch,
        q_length=queries,
        kv_length=keys,
        q_offset=keys - queries,
        kv_offset=0,
        mask_function=function,
        attention_mask=is_token,
        device=torch.device("cpu"),
        **window,
    )


def test_masks() -> None:
    left = torch.arange(LENGTH) >= torch.tensor([[0], [4], [7]])
    padding = mask_of(left, LENGTH)
    assert padding is not None and padding.tolist() == [0, 4, 7] and padding.device.type == "cpu"
    assert mask_of(torch.ones_like(left), LENGTH) is None
    decoding = mask_of(left, 1)
    assert decoding is not None and torch.equal(decoding, left[:, None, None])
    # Everything else is transformers' own mask.
    for other in (mask_of(left.flip(1), LENGTH), mask_of(left, LENGTH, sliding_window_causal_mask_function(4))):
        assert other is not None and other.shape == (3, 1, LENGTH, LENGTH)


def test_prompts_of_different_lengths_need_no_mask_of_all_pairs(tiny_dir: Path) -> None:
    """Greedy tokens equal those of transformers' `sdpa`, logits within 1e-4 (float32, values of up to 1)."""
    length = 700
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 60, (3, length), generator=generator)
    is_token = (torch.arange(length) >= torch.tensor([[0], [250], [660]])).long()
    results = []
    for own in (True, False):
        vlm: Any = load_vlm(tiny_dir, torch.float32, "sdpa").eval()
        text = vlm.model.language_model
        with torch.no_grad():  # so that tokens do not repeat
            for index, layer in enumerate(text.layers):
                layer.mlp.down_proj.weight.normal_(std=0.5, generator=generator.manual_seed(index))
        if own:
            use_causal_sdpa(text)
        with PairwiseTensors(length) as found:
            output = vlm.generate(
                input_ids=ids,
                attention_mask=is_token,
                do_sample=False,
                max_new_tokens=6,
                min_new_tokens=6,
                return_dict_in_generate=True,
                output_logits=True,
            )
        results.append((found.operators, output.sequences[:, length:], torch.stack(output.logits)))
    (own_operators, own_tokens, own_logits), (stock_operators, stock_tokens, stock_logits) = results
    assert not own_operators and stock_operators
    assert torch.equal(own_tokens, stock_tokens) and len(set(own_tokens.flatten().tolist())) > 3
    torch.testing.assert_close(own_logits, stock_logits, rtol=1e-4, atol=1e-4)


def test_a_built_model_uses_it_instead_of_sdpa_only(model_config: Any) -> None:
    model = build_model(model_config, torch.device("cpu"), 0)
    text = model.family.language_model(model.base)
    assert text.config._attn_implementation == CAUSAL_SDPA
    assert model.family.vision_tower(model.base).config._attn_implementation == VISION_ATTENTION
    text.set_attn_implementation("eager")
    use_causal_sdpa(text)
    assert text.config._attn_implementation == "eager"
