"""Overridden forwards of module instances."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from w2r2_ds.utils.forward_override import override_forward


def test_overridden_forwards_nest_and_are_restored() -> None:
    module = torch.nn.Identity()
    module.forward = lambda x: 2 * x  # an earlier override

    def plus(number: int) -> Any:
        return lambda inner, x: inner(x) + number

    with override_forward(module, plus(1)):
        with override_forward(module, plus(10)):
            assert module(3) == 17
        assert module(3) == 7
        with pytest.raises(RuntimeError), override_forward(module, plus(100)):
            raise RuntimeError
        assert module(3) == 7
    assert module(3) == 6
    other = torch.nn.Identity()
    with override_forward(other, plus(1)):
        assert other(1) == 2
    assert other(1) == 1 and "forward" not in vars(other)
