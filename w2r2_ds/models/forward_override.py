"""Replace the forward of one module instance inside a `with` block; class and parameter names are unchanged."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def bound(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Inside, `module` runs ``forward(inner, *args, **kwargs)``, where `inner` is its previous forward.

    Hooks, also DeepSpeed's, run once per call as before: parameters that a ZeRO-3 leaf module gathers stay gathered
    during the whole `forward`.
    """
    own, inner = "forward" in vars(module), module.forward
    module.forward = functools.partial(forward, inner)
    try:
        yield
    finally:
        if own:
            module.forward = inner
        else:
            del module.forward
