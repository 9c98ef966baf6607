"""Order in which the shortcut pass (2D only) and the fused pass run through the decoder (`train.pass_order`).

Losses and gradients do not depend on the order; memory and the number of ZeRO-3 all-gathers do:

* `sequential`: the whole shortcut pass, then the whole fused pass. ZeRO-3 gathers every decoder layer three times: in
  both forwards and in the fused pass's backward. Of the shortcut, only the states of the answer positions are kept.
* `lockstep`: each layer runs the shortcut and then the fused input while its weights are gathered. Two gathers per
  layer (forward, backward), as in single-pass training. Costs one more hidden state, ``[sequences, length, hidden]``.

In both orders every module processes the shortcut before the fused input, and both passes are in one engine forward.
This keeps ZeRO-3's parameter trace valid (so that it can prefetch), and every gathered parameter is released.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from w2r2_ds.models.layer_inputs import OnInput
from w2r2_ds.models.w2r2 import W2R2
from w2r2_ds.types.batch import Batch
from w2r2_ds.utils.forward_override import override_forward

if TYPE_CHECKING:
    from transformers.modeling_outputs import BaseModelOutputWithPooling as VisionOutput


class PassOrder(Protocol):
    """Runs both passes of the language model."""

    def __call__(
        self,
        batch: Batch,
        shortcut: VisionOutput,
        fused: VisionOutput,
        include_description: bool,
        on_shortcut_input: OnInput | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Last hidden states of both passes, (shortcut, fused), ``[answer tokens, hidden]`` each.

        Args:
            batch: token ids, positions, answer positions.
            shortcut: visual tokens of the shortcut pass.
            fused: visual tokens of the fused pass.
            include_description: append the states of the description's tokens.
            on_shortcut_input: called with the input of every decoder layer in the shortcut pass; None for no call.
        """
        ...


def build_pass_order(model: W2R2, order: str, shortcut_no_grad: bool, zero3: bool) -> PassOrder:
    """The pass order of `train.pass_order`; ``auto`` is lockstep under ZeRO-3 if the shortcut has no graph.

    Args:
        model: the composed model.
        order: auto, sequential or lockstep. Lockstep keeps no graph of the shortcut pass.
        shortcut_no_grad: run the shortcut pass under ``no_grad``.
        zero3: whether DeepSpeed shards the parameters.

    Raises:
        ValueError: the order is lockstep, but the push term differentiates through the shortcut pass.
    """
    if order == "lockstep" and not shortcut_no_grad:
        raise ValueError(
            "train.pass_order is lockstep, which keeps no graph of the shortcut pass, but objective.push_term needs it "
            "(stop_gradient is False); choose train.pass_order sequential, or auto."
        )
    if order == "auto":
        order = "lockstep" if zero3 and shortcut_no_grad else "sequential"
    return LockstepPasses(model) if order == "lockstep" else SequentialPasses(model, shortcut_no_grad)


class SequentialPasses:
    """The whole shortcut pass, then the whole fused pass.

    Args:
        model: the composed model.
        shortcut_no_grad: run the shortcut pass under ``no_grad``.
    """

    def __init__(self, model: W2R2, shortcut_no_grad: bool) -> None:
        self.model, self.shortcut_no_grad, self.dropouts = model, shortcut_no_grad, dropouts_of(model)

    def __call__(
        self,
        batch: Batch,
        shortcut: VisionOutput,
        fused: VisionOutput,
        include_description: bool,
        on_shortcut_input: OnInput | None = None,
    ) -> tuple[Tensor, Tensor]:
        # No dropout in the shortcut, because its answer is measured. So it draws no random numbers either, and the
        # fused pass has the same dropout masks in both orders.
        with torch.no_grad() if self.shortcut_no_grad else nullcontext(), without_dropout(self.dropouts):
            shortcut_states = self.model.answer_hidden_states(batch, shortcut, include_description, on_shortcut_input)
        return shortcut_states, self.model.answer_hidden_states(batch, fused, include_description)


class LockstepPasses:
    """Both passes together: every decoder layer and the final norm run the shortcut, then the fused input.

    The loop over the layers in transformers carries one hidden state, the fused one. The forward of every layer is
    overridden during the pass so that it also advances the shortcut's hidden state. Rotary embeddings, masks and all
    other arguments of a layer are the same for both passes.

    Args:
        model: the composed model.
    """

    def __init__(self, model: W2R2) -> None:
        text: Any = model.family.language_model(model.base)
        self.model = model
        self.layers_and_norm = [(module, dropouts_of(module)) for module in (*text.layers, text.norm)]

    def __call__(
        self,
        batch: Batch,
        shortcut: VisionOutput,
        fused: VisionOutput,
        include_description: bool,
        on_shortcut_input: OnInput | None = None,
    ) -> tuple[Tensor, Tensor]:
        shortcut_inputs, fused_inputs = self.model.input_streams(batch, shortcut, fused)
        state = [shortcut_inputs]  # a list, so that the overridden forwards can replace the tensor in it
        # The language model's own loop runs the fused pass; the context manager adds the shortcut to each layer.
        advance = self.advance_shortcut(state, batch, shortcut, on_shortcut_input)
        fused_states = self.model.run_decoder(batch, fused_inputs, fused, include_description, advance)
        return state[0], fused_states

    @contextmanager
    def advance_shortcut(
        self, state: list[Tensor], batch: Batch, shortcut: VisionOutput, on_input: OnInput | None
    ) -> Iterator[None]:
        """Override the forward of every decoder layer and of the final norm: run the shortcut's hidden state first.

        Args:
            state: one element, the shortcut's hidden state ``[sequences, length, hidden]``. Every module replaces it
                by its output. The last decoder layer returns the answer tokens only.
            batch: positions of visual tokens.
            shortcut: visual tokens of the shortcut pass.
            on_input: called with the shortcut's input of every decoder layer; None for no call.
        """
        family = self.model.family

        def override(index: int, module: nn.Module, dropouts: Sequence[nn.Dropout]) -> Callable[..., Any]:
            def forward(inner: Callable[..., Any], hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
                # Shortcut first, as in the sequential order. Under no_grad `inner` skips activation checkpointing, and
                # only one hidden state of the shortcut is alive at a time.
                is_norm = index == len(self.layers_and_norm) - 1
                with torch.no_grad(), without_dropout(dropouts):
                    if on_input is not None and not is_norm:
                        on_input(index, module, state[0], kwargs)
                    advanced = inner(state[0], *args, **kwargs)
                    # DeepStack families add visual features after some layers; the final norm is not a layer.
                    state[0] = advanced if is_norm else family.add_layer_features(advanced, index, batch, shortcut)
                # `inner` includes activation checkpointing, but not ZeRO-3's hooks: those belong to the module's
                # __call__. They run around both `inner` calls, so one gather serves both passes. Only the fused pass
                # is recomputed in the backward pass.
                return inner(hidden, *args, **kwargs)

            return forward

        with ExitStack() as stack:
            for index, (module, dropouts) in enumerate(self.layers_and_norm):
                stack.enter_context(override_forward(module, override(index, module, dropouts)))
            yield


def dropouts_of(module: nn.Module) -> list[nn.Dropout]:
    """Dropout layers of a module with a positive rate."""
    return [layer for layer in module.modules() if isinstance(layer, nn.Dropout) and layer.p > 0]


@contextmanager
def without_dropout(dropouts: Sequence[nn.Dropout]) -> Iterator[None]:
    """Disable dropout layers; other modules stay in training mode, which activation checkpointing depends on."""
    training = [module.training for module in dropouts]
    for module in dropouts:
        module.training = False
    try:
        yield
    finally:
        for module, state in zip(dropouts, training, strict=True):
            module.training = state
