"""The total does not depend on how samples are put into batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from w2r2_ds.config import ObjectiveConfig
from w2r2_ds.objective.w2r2 import STATS, read_shortcut, sample_weights, w2r2_loss


def logits_of(samples: list[Any], batch: Any, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Fused and shortcut logits that depend on the sample alone."""
    rows = batch.answer_rows
    result = []
    for salt, sure in ((0, 4.0), (1, 30.0)):
        parts = []
        for index, sample in enumerate(samples):
            label = rows.label[rows.sample == index]
            generator = torch.Generator().manual_seed(len(sample.frames) + 100 * salt)
            logits = torch.randn(len(label), vocabulary, generator=generator)
            logits[torch.arange(len(label)), label] += sure
            parts.append(logits)
        result.append(torch.cat(parts))
    return result[0].requires_grad_(), result[1]


def run(
    samples: list[Any], batch_of: Any, tables: Any, reduction: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss, statistics and gradient of one batch."""
    batch = batch_of(samples)
    fused, short = logits_of(samples, batch, len(tables.digit))
    config = ObjectiveConfig(reduction=reduction)  # type: ignore[arg-type]
    loss, stats = w2r2_loss(fused, read_shortcut(short, batch.answer_rows.label), batch, config, tables)
    loss.backward()
    assert fused.grad is not None
    return loss.detach(), stats, fused.grad


@pytest.mark.parametrize("reduction", ["sample", "token"])
def test_split_order_and_padding(samples: list[Any], batch_of: Any, tables: Any, reduction: str) -> None:
    loss, stats, gradient = run(samples, batch_of, tables, reduction)
    assert stats.shape == (3, len(STATS)) and not stats.requires_grad
    assert (stats[:, STATS.index("above_mu")] == 1).all() and (stats[:, STATS.index("push")] > 0).all()
    alone = [run([sample], batch_of, tables, reduction) for sample in samples]
    torch.testing.assert_close(loss, sum(part[0] for part in alone))
    torch.testing.assert_close(stats, torch.cat([part[1] for part in alone]))
    torch.testing.assert_close(gradient, torch.cat([part[2] for part in alone]))
    turned = run(samples[::-1], batch_of, tables, reduction)
    torch.testing.assert_close(loss, turned[0])
    torch.testing.assert_close(stats, turned[1].flip(0))


def test_reductions_by_hand(samples: list[Any], batch_of: Any, tables: Any) -> None:
    """`sample`: every sample's mean counts once. `token`: by its tokens, so that align is the mean over tokens."""
    by_sample, stats, _ = run(samples, batch_of, tables, "sample")
    by_token, same, _ = run(samples, batch_of, tables, "token")
    assert torch.equal(stats, same)
    batch = batch_of(samples)
    counts = batch.answer_rows.sample.bincount().float()
    assert sample_weights(batch, "sample").tolist() == [1.0] * 3
    assert torch.equal(sample_weights(batch, "token"), counts)
    torch.testing.assert_close(by_sample, stats[:, 0].sum())
    torch.testing.assert_close(by_token, (counts * stats[:, 0]).sum())
    fused, _ = logits_of(samples, batch, len(tables.digit))
    mean = torch.nn.functional.cross_entropy(fused.detach(), batch.answer_rows.label)
    torch.testing.assert_close((counts * stats[:, STATS.index("align")]).sum() / counts.sum(), mean)


def test_statistics_add_up(samples: list[Any], batch_of: Any, tables: Any) -> None:
    _, stats, _ = run(samples, batch_of, tables, "sample")
    column = dict(zip(STATS, stats.T, strict=True))
    torch.testing.assert_close(column["loss"], column["align"] + column["push"])
    torch.testing.assert_close(column["det"], (column["s_short"] - 0.7).clamp(min=0))
    assert (column["s_short"] > 0.95).all()
