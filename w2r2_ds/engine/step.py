"""The W2R2 step: one engine forward that runs the shortcut pass under no_grad first, then the fused pass.

This order keeps ZeRO-3's parameter trace valid and leaves nothing gathered behind (docs/architecture.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from w2r2_ds.config import ObjectiveConfig
from w2r2_ds.data.collate import Batch
from w2r2_ds.data.slots import TokenTables
from w2r2_ds.models.w2r2 import W2R2
from w2r2_ds.objective.w2r2 import Shortcut, read_shortcut, w2r2_loss


class W2R2Step(nn.Module):
    """What DeepSpeed wraps: forward makes the loss of one micro-batch.

    Args:
        model: the composed model.
        objective: lambda, mu, push term and reduction.
        tables: what a predicted token means inside a number.
    """

    def __init__(self, model: W2R2, objective: ObjectiveConfig, tables: TokenTables) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self.tables = tables
        self.dropouts = [module for module in model.modules() if isinstance(module, nn.Dropout) and module.p > 0]

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Weighted sum of the losses of the samples, and their statistics ``[batch, len(STATS)]``."""
        visual = self.model.encode_2d(batch.visuals)
        features = self.model.encode_3d(batch.visuals)
        shortcut = self.shortcut(batch, visual, features)
        fused = self.model.fuse(visual, self.model.merge(features))
        logits = self.model.logits(self.model.hidden(batch, fused))
        return w2r2_loss(logits, shortcut, batch, self.objective, self.tables)

    @torch.no_grad()
    def shortcut(self, batch: Batch, visual: object, features: list[torch.Tensor]) -> Shortcut:
        """The 2D-only pass, Phi(F2D, 0): no graph, no dropout."""
        with self.without_dropout():
            plain = self.model.fuse(visual, self.model.merge_nothing(features))
            logits = self.model.logits(self.model.hidden(batch, plain))
        return read_shortcut(logits, batch.answer_rows.label)

    @contextmanager
    def without_dropout(self) -> Iterator[None]:
        """Switch off the dropout layers, by their own flag, for the length of the shortcut pass."""
        training = [module.training for module in self.dropouts]
        for module in self.dropouts:
            module.training = False
        try:
            yield
        finally:
            for module, state in zip(self.dropouts, training, strict=True):
                module.training = state
