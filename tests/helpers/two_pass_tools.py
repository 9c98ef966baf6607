"""A model whose parameters are all trained."""

from __future__ import annotations

from typing import Any


def unfreeze(model: Any) -> None:
    """All weights of the language model train."""
    for module in (model.base.model.language_model, model.base.lm_head):
        module.requires_grad_(True)
