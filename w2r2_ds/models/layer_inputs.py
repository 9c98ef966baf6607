"""Call a function with the input of every decoder layer during a forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from w2r2_ds.utils.forward_override import override_forward

OnInput = Callable[[int, nn.Module, Tensor, Mapping[str, Any]], None]
"""(index of the layer, layer, its input ``[sequences, length, hidden]``, its keyword arguments) -> None."""


@contextmanager
def on_layer_inputs(layers: Sequence[nn.Module], function: OnInput) -> Iterator[None]:
    """Context in which every layer calls `function` before its forward.

    The function is part of the layer's forward, not a hook: under ZeRO-3 the layer's weights are gathered while it
    runs. A layer that is recomputed in the backward pass calls it in its first forward only.
    """

    def override(index: int, layer: nn.Module) -> Callable[..., Any]:
        def forward(inner: Callable[..., Any], hidden: Tensor, *args: Any, **given: Any) -> Any:
            function(index, layer, hidden, given)
            return inner(hidden, *args, **given)

        return forward

    with ExitStack() as stack:
        for index, layer in enumerate(layers):
            stack.enter_context(override_forward(layer, override(index, layer)))
        yield
