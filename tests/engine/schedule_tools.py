"""A pass without a shortcut, a model that trains whole, and a count of what ZeRO-3 gathers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


def fused_alone(model: Any, batch: Any, plain: Any, fused: Any, with_what: bool) -> tuple[Any, Any]:
    """A schedule without a shortcut pass: the fused pass's states stand for it."""
    states = model.hidden(batch, fused, with_what)
    return states.detach(), states


def unfreeze(model: Any) -> None:
    """All weights of the language model train."""
    for module in (model.base.model.language_model, model.base.lm_head):
        module.requires_grad_(True)


@contextlib.contextmanager
def gathers(model: Any) -> Iterator[dict[str, int]]:
    """How often each parameter of the decoder layers is gathered inside, by name."""
    from deepspeed.runtime.zero.partitioned_param_coordinator import InflightParamRegistry

    layers = model.base.model.language_model.layers
    names = {id(parameter): name for name, parameter in layers.named_parameters()}
    counts = dict.fromkeys(names.values(), 0)
    saved = InflightParamRegistry.__setitem__

    def counted(self: Any, parameter: Any, handle: Any) -> None:
        if id(parameter) in names:
            counts[names[id(parameter)]] += 1
        saved(self, parameter, handle)

    InflightParamRegistry.__setitem__ = counted
    try:
        yield counts
    finally:
        InflightParamRegistry.__setitem__ = saved
