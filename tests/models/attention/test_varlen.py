"""Attention over segments: every implementation against attention written out per segment, with gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from varlen_reference import flash_attn_package, segment_attention, torch_varlen_on_cpu
from w2r2_ds.models.attention import varlen
from w2r2_ds.models.attention.varlen import batches, cumulative, has_torch_varlen, varlen_attention

CASES: dict[str, dict[str, Any]] = {
    "one segment": {"lengths": (7,)},
    "windows": {"lengths": (4, 4, 2, 4, 2, 1)},
    "one token each": {"lengths": (1, 1, 1)},
    "causal": {"lengths": (3, 5, 3), "causal": True},
    "more keys": {"lengths": (3, 1, 3, 2), "key_lengths": (5, 4, 5, 9)},
    "causal, more keys": {"lengths": (4, 2, 3, 1, 2), "key_lengths": (4, 6, 7, 5, 2), "causal": True},
}
"""Segments, and further arguments."""


def inputs(case: dict[str, Any], heads: tuple[int, int], dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    """Random query, key and value."""
    generator = torch.Generator().manual_seed(0)
    tokens, keys = sum(case["lengths"]), sum(case.get("key_lengths", case["lengths"]))
    sizes = [(tokens, heads[0], 16), (keys, heads[1], 16), (keys, heads[1], 16)]
    return [torch.randn(size, generator=generator, dtype=torch.float64).to(device, dtype) for size in sizes]


def results(function: Any, given: list[Tensor], *args: Any, **options: Any) -> list[Tensor]:
    """Output of an attention function and its gradients with respect to query, key and value."""
    leaves = [each.detach().clone().requires_grad_() for each in given]
    output = function(*leaves, *args, **options)
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [output.detach(), *torch.autograd.grad((output * weight.to(output)).sum(), leaves)]


def expected(given: list[Tensor], case: dict[str, Any], scale: float | None) -> list[Tensor]:
    """`results` of the reference in float64."""
    exact = [each.double().cpu() for each in given]
    lengths = case["lengths"]
    window = (-1, 0 if case.get("causal") else -1)
    return results(segment_attention, exact, lengths, case.get("key_lengths", lengths), window, scale)


def error(actual: Tensor, exact: Tensor) -> float:
    """Largest difference, relative to the largest value. At least to 1: a segment of one key has gradients of 0."""
    return float((actual - exact).abs().max() / exact.abs().max().clamp(min=1))


@pytest.fixture(params=["sdpa", "torch varlen", "flash-attn"])
def backend(request: pytest.FixtureRequest) -> Iterator[varlen.Backend]:
    """The argument `backend`, with which the named implementation runs."""
    context = {"sdpa": nullcontext, "torch varlen": torch_varlen_on_cpu, "flash-attn": flash_attn_package}
    with context[request.param]():
        yield "flash_attn" if request.param == "flash-attn" else "torch"


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_outputs_and_gradients_equal_the_reference(
    backend: varlen.Backend, case: dict[str, Any], heads: tuple[int, int], scale: float | None
) -> None:
    """float64: within 1e-12, where only the order of sums differs."""
    given = inputs(case, heads, torch.float64)
    actual = results(varlen_attention, given, **case, scale=scale, backend=backend)
    for mine, theirs in zip(actual, expected(given, case, scale), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 3e-2)])
def test_sdpa_in_the_dtypes_of_training(case: dict[str, Any], dtype: torch.dtype, tolerance: float) -> None:
    """Relative to the largest value, or to 1: some roundings of float32 (2**-24) and bfloat16 (2**-9)."""
    given = inputs(case, (4, 2), dtype)
    for mine, theirs in zip(results(varlen_attention, given, **case), expected(given, case, None), strict=True):
        assert mine.dtype == dtype
        assert error(mine, theirs) <= tolerance


def test_torch_varlen_is_one_call_without_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch 2.14 would choose cuDNN for the window (-1, -1) on Hopper."""
    windows = []
    stock = varlen.varlen_attn
    monkeypatch.setattr(varlen, "varlen_attn", lambda *a, **k: (windows.append(k["window_size"]), stock(*a, **k))[1])
    case = CASES["windows"]
    with torch_varlen_on_cpu() as calls:
        varlen_attention(*inputs(case, (4, 4), torch.float32), case["lengths"])
        varlen_attention(*inputs(case, (4, 4), torch.float32), case["lengths"], causal=True)
    assert calls == [4, 4] and windows == [(4, 4), (-1, 0)]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_sdpa_calls_do_not_grow_with_the_number_of_segments(
    case: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    stock = varlen.grouped_sdpa
    monkeypatch.setattr(varlen, "grouped_sdpa", lambda *a, **k: (calls.append(len(a[0])), stock(*a, **k))[1])
    many = {key: value if key == "causal" else value * 50 for key, value in case.items()}
    varlen_attention(*inputs(many, (4, 4), torch.float32), **many)
    pairs = set(zip(case["lengths"], case.get("key_lengths", case["lengths"]), strict=True))
    assert len(calls) <= len(pairs) and sum(calls) == len(many["lengths"])


def test_questions_about_one_prefix_share_a_call() -> None:
    assert batches((6, 2, 3, 6, 1), (6, 8, 9, 6, 4), True) == ((0, 3), (1, 2), (4,))
    assert batches((6, 2, 3), (6, 8, 9), False) == ((0,), (1,), (2,))
    with pytest.raises(AssertionError, match="as many keys"):
        batches((3,), (2,), True)


def test_segments_must_cover_all_tokens() -> None:
    given = inputs(CASES["one segment"], (4, 4), torch.float32)
    with pytest.raises(AssertionError, match="cover"):
        varlen_attention(*given, (3, 3))
    with pytest.raises(AssertionError, match="cover"):
        varlen_attention(*given, (7,), (8,))


@pytest.mark.parametrize(
    ("device", "dtype", "head_size", "capability", "supported"),
    [
        ("cuda", torch.bfloat16, 80, (8, 0), True),
        ("cuda", torch.float16, 128, (9, 0), True),
        ("cuda", torch.float32, 80, (9, 0), False),
        ("cuda", torch.bfloat16, 80, (7, 5), False),
        ("cuda", torch.bfloat16, 84, (9, 0), False),
        ("cuda", torch.bfloat16, 512, (9, 0), False),
        ("cpu", torch.bfloat16, 80, (9, 0), False),
    ],
)
def test_where_torch_varlen_runs(
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    dtype: torch.dtype,
    head_size: int,
    capability: tuple[int, int],
    supported: bool,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert has_torch_varlen(torch.device(device), dtype, head_size) is supported


def test_cumulative_lengths_are_cached() -> None:
    device = torch.device("cpu")
    assert cumulative((3, 1), device).tolist() == [0, 3, 4] and cumulative((3, 1), device).dtype == torch.int32
    assert cumulative((3, 1), device) is cumulative((3, 1), device)


def test_a_training_step_can_use_cached_lengths_of_an_evaluation() -> None:
    """Autograd saves them for the backward pass, which it rejects for tensors made in inference mode."""
    case = {"lengths": (11, 13), "causal": True}
    given = inputs(case, (4, 2), torch.float32)
    cumulative.cache_clear()
    with torch_varlen_on_cpu():
        with torch.inference_mode():
            varlen_attention(*given, **case)
        results(varlen_attention, given, **case)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 3e-2), (torch.float32, 1e-5)])
def test_on_a_gpu(case: dict[str, Any], heads: tuple[int, int], dtype: torch.dtype, tolerance: float) -> None:
    """`varlen_attn` in bfloat16, SDPA in float32, relative to the largest value."""
    given = inputs(case, heads, dtype, "cuda")
    assert has_torch_varlen(given[0].device, dtype, 16) is (dtype == torch.bfloat16)
    for mine, theirs in zip(results(varlen_attention, given, **case), expected(given, case, None), strict=True):
        assert error(mine.cpu(), theirs) <= tolerance


def test_the_reference_masks_the_bottom_right() -> None:
    """Against SDPA's own causal mask, so that the reference is right too."""
    q, k, v = inputs({"lengths": (4,)}, (2, 2), torch.float64)
    stock = torch.nn.functional.scaled_dot_product_attention(
        *(each.transpose(0, 1)[None] for each in (q, k, v)), is_causal=True
    )
    actual = segment_attention(q, k, v, (4,), (4,), (-1, 0), None)
    torch.testing.assert_close(actual, stock[0].transpose(0, 1), rtol=0, atol=1e-12)
