"""Masked 2D tokens: their number, and that they depend only on sample, seed and step."""

from __future__ import annotations

import math

import pytest
import torch

from w2r2_ds.models.token_masking import mask_2d, mask_images


def test_a_ratio_of_zero_is_the_same_tensor_and_draws_nothing() -> None:
    visual = torch.randn(7, 4)
    state = torch.get_rng_state()
    assert mask_2d(visual, 0.0) is visual
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("count", "ratio", "masked"), [(10, 0.25, 3), (10, 0.24, 2), (1, 0.5, 1), (1, 0.4, 0), (0, 0.8, 0), (252, 0.8, 202)]
)
def test_the_number_of_masked_tokens_is_exact(count: int, ratio: float, masked: int) -> None:
    visual = torch.randn(count, 4).add(10)
    original = visual.clone()
    result = mask_2d(visual, ratio)
    zero = (result == 0).all(-1)
    assert int(zero.sum()) == masked
    assert torch.equal(result[~zero], visual[~zero]) and torch.equal(visual, original)


def test_every_token_is_masked_as_often_as_any_other() -> None:
    generator = torch.Generator().manual_seed(0)
    visual, draws, ratio = torch.ones(12, 1), 4000, 0.25
    often = torch.stack([mask_2d(visual, ratio, generator)[:, 0] == 0 for _ in range(draws)]).float().mean(0)
    # five standard deviations of the binomial distribution
    assert (often - ratio).abs().max() < 5 * math.sqrt(ratio * (1 - ratio) / draws)
    first, second = (mask_2d(visual, ratio, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first, second)


def masked_of(samples: list[tuple[str, int]], seed: int = 0, step: int = 0, tokens: int = 40) -> list[list[int]]:
    """Per image, the tokens that are zeroed."""
    images = [torch.ones(tokens, 2) for _ in range(sum(count for _, count in samples))]
    torch.rand(1)  # the default generator does not matter
    return [
        (image == 0).all(-1).nonzero().flatten().tolist() for image in mask_images(images, samples, 0.5, seed, step)
    ]


def test_masks_depend_only_on_sample_seed_and_step() -> None:
    one, two, three = masked_of([("a", 2), ("b", 1)])
    assert [len(one), len(two), len(three)] == [20, 20, 20]
    assert one != two and one != three  # images of a sample differ, and samples do
    others = masked_of([("b", 1), ("c", 3), ("a", 2)])
    assert [others[0], *others[4:]] == [three, one, two]
    assert masked_of([("a", 2)], step=1) != [one, two] and masked_of([("a", 2)], seed=1) != [one, two]
    assert masked_of([]) == [] and masked_of([("a", 0), ("b", 1)]) == [three]


def test_masked_tokens_have_no_gradient() -> None:
    visual = torch.randn(10, 3, dtype=torch.float64, requires_grad=True)
    result = mask_2d(visual, 0.4)
    result.sum().backward()
    assert visual.grad is not None and torch.equal(visual.grad == 0, result == 0)
    with pytest.raises(AssertionError, match="ratio of masked tokens"):
        mask_2d(visual, 1.1)
