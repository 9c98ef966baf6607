"""Count the parameters that ZeRO-3 gathers, and a pass order without a visual-only pass for comparison."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from w2r2_ds.types.batch import Batch


@dataclass
class Counts:
    """Gathers of ZeRO-3.

    Attributes:
        layers: parameter name -> number of gathers, for the decoder layers.
        bytes: bytes gathered, all parameters.
    """

    layers: dict[str, int] = field(default_factory=dict)
    bytes: int = 0


@contextmanager
def counting(language_model: Any) -> Iterator[Counts]:
    """Count the gathers that DeepSpeed starts in the block, by patching its registry of parameters in flight."""
    from deepspeed.runtime.zero.partitioned_param_coordinator import InflightParamRegistry  # seconds

    names = {id(parameter): name for name, parameter in language_model.layers.named_parameters()}
    counts, saved = Counts(dict.fromkeys(names.values(), 0)), InflightParamRegistry.__setitem__

    def counted(self: Any, parameter: Any, handle: Any) -> None:
        counts.bytes += parameter.ds_numel * parameter.element_size()
        if id(parameter) in names:
            counts.layers[names[id(parameter)]] += 1
        saved(self, parameter, handle)

    InflightParamRegistry.__setitem__ = counted
    try:
        yield counts
    finally:
        InflightParamRegistry.__setitem__ = saved


def fused_alone(model: Any, batch: Batch, plain: Any, fused: Any, with_what: bool) -> tuple[Tensor, Tensor]:
    """Pass order with the fused pass only; its states replace those of the visual-only pass."""
    states = model.hidden(batch, fused, with_what)
    return states.detach(), states
