"""Errors of `deepspeed.initialize`."""

from __future__ import annotations

from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist

from w2r2_ds.training.deepspeed.engine import initialize


def raising(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(**given: Any) -> None:
        raise error

    monkeypatch.setattr(deepspeed, "initialize", fail)


@pytest.mark.parametrize(
    "kind", [AssertionError, TypeError, ValueError, KeyError, ZeroDivisionError, RuntimeError, Exception]
)
def test_errors_of_settings_name_the_json(monkeypatch: pytest.MonkeyPatch, kind: type[Exception]) -> None:
    """As ValueErrors, which end a run with exit code 1."""
    raising(monkeypatch, kind("not supported\n with stage 2"))
    with pytest.raises(ValueError) as caught:
        initialize("ds.json", config={})
    message = str(caught.value)
    assert (
        message.startswith("ds.json: ")
        and all(word in message for word in (kind.__name__, "not supported", "with stage 2"))
        and "\n" not in message
    )
    assert isinstance(caught.value.__cause__, kind)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("out of memory"),
        dist.DistNetworkError("connection lost"),
        OSError("disk"),
        RuntimeError("[gloo/transport/tcp/pair.cc:525] Connection closed by peer"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_other_errors_pass_unchanged(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    raising(monkeypatch, error)
    with pytest.raises(type(error)) as caught:
        initialize("ds.json", config={})
    assert caught.value is error
