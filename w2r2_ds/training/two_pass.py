"""How the two passes take turns. Losses and gradients are the same; what ZeRO-3 gathers, and how often, is not.

`sequential`: the whole shortcut pass, then the fused one. ZeRO-3 gathers every decoder layer three times: for either
pass, and for the fused one's backward pass. No memory but the states of the rows is kept of the shortcut.

`lockstep`: every layer first advances the shortcut, then runs the fused stream; it is gathered once for both, and once
more for the backward pass, as often as by a single pass. The shortcut's hidden state is all that lives beside.

In both, what the shortcut does in a module comes before what the fused pass does there, inside one engine forward:
this keeps ZeRO-3's parameter trace valid and leaves nothing gathered behind (docs/architecture.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from w2r2_ds.config.schema import RunConfig
from w2r2_ds.models.emit import input_streams
from w2r2_ds.models.forward_override import bound
from w2r2_ds.models.w2r2 import W2R2, embed, row_states
from w2r2_ds.objective.push_terms import find_push_term
from w2r2_ds.types.batch import Batch

Schedule = Callable[[Batch, Any, Any, bool], tuple[Tensor, Tensor]]
"""(batch, shortcut's visual tokens, fused ones, with what positions) -> last hidden states ``[rows, hidden]`` of both.

Visual tokens are a vision tower's output. The shortcut's states have no graph, unless the reading keeps it.
"""


def make_two_pass(model: W2R2, config: RunConfig, zero3: bool) -> Schedule:
    """The schedule of `train.pass_order`."""
    blocked = find_push_term(config.objective.push).blocked
    chosen = config.train.pass_order
    if chosen == "auto":
        chosen = "lockstep" if zero3 and blocked else "sequential"
    return Lockstep(model) if chosen == "lockstep" else Sequential(model, blocked)


class Sequential:
    """The shortcut pass, then the fused pass.

    Args:
        model: the composed model.
        blocked: the shortcut has no graph.
    """

    def __init__(self, model: W2R2, blocked: bool) -> None:
        self.model, self.blocked, self.dropouts = model, blocked, dropouts_of(model)

    def __call__(self, batch: Batch, plain: Any, fused: Any, with_what: bool) -> tuple[Tensor, Tensor]:
        with torch.no_grad() if self.blocked else nullcontext(), without_dropout(self.dropouts):
            short = self.model.hidden(batch, plain, with_what)
        return short, self.model.hidden(batch, fused, with_what)


class Lockstep:
    """Both streams through every decoder layer and the last norm, the shortcut first.

    The stock loop carries the fused stream and knows of no other. The shortcut's hidden state is kept aside; rotary
    tables, masks and whatever else a layer is given are the same for both.
    """

    def __init__(self, model: W2R2) -> None:
        text = model.base.model.language_model
        self.model = model
        self.stages = [(stage, dropouts_of(stage)) for stage in (*text.layers, text.norm)]

    def __call__(self, batch: Batch, plain: Any, fused: Any, with_what: bool) -> tuple[Tensor, Tensor]:
        base = self.model.base
        inputs, shortcut = input_streams(batch, embed(base, batch), plain, fused, self.model.kernels)
        short = [shortcut]
        states = row_states(base, batch, inputs, with_what, self.beside(short))
        return short[0], states

    @contextmanager
    def beside(self, short: list[Tensor]) -> Iterator[None]:
        """Inside, every stage advances ``short[0]`` before it does what it always does."""

        def both(dropouts: Sequence[nn.Dropout]) -> Callable[..., Any]:
            def forward(inner: Callable[..., Any], hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
                with torch.no_grad(), without_dropout(dropouts):
                    short[0] = inner(short[0], *args, **kwargs)
                return inner(hidden, *args, **kwargs)  # its checkpointing is in here, behind ZeRO-3's hooks

            return forward

        with ExitStack() as stack:
            for stage, dropouts in self.stages:
                stack.enter_context(bound(stage, both(dropouts)))
            yield


def dropouts_of(module: nn.Module) -> list[nn.Dropout]:
    """The dropout layers that do something."""
    return [each for each in module.modules() if isinstance(each, nn.Dropout) and each.p > 0]


@contextmanager
def without_dropout(dropouts: Sequence[nn.Dropout]) -> Iterator[None]:
    """Switch dropout layers off, by their own flag."""
    training = [module.training for module in dropouts]
    for module in dropouts:
        module.training = False
    try:
        yield
    finally:
        for module, state in zip(dropouts, training, strict=True):
            module.training = state
