"""Fixtures: payloads that create a marker file when they are executed, and a model folder to put them into."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


class CallOnUnpickle:
    """An object whose pickle calls a function when it is loaded."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """Marker file: it exists if untrusted code was executed."""
    return tmp_path / "ran"


@pytest.fixture
def payload(mark: Path) -> CallOnUnpickle:
    """An object whose pickle creates the marker file when it is loaded."""
    return CallOnUnpickle(open, str(mark), "w")


@pytest.fixture
def code(mark: Path) -> str:
    """Source of a Python module that creates the marker file on import and defines a model, config and tokenizer."""
    return (
        f"open({str(mark)!r}, 'w').close()\n"
        "from transformers import PreTrainedModel, PreTrainedTokenizer, PretrainedConfig\n"
        "class Config(PretrainedConfig):\n    model_type = 'qwen2_5_vl'\n"
        "class Model(PreTrainedModel):\n    config_class = Config\n"
        "class Tokenizer(PreTrainedTokenizer):\n    pass\n"
    )


@pytest.fixture
def vlm_folder(model_config: Any, tmp_path: Path) -> Path:
    """A copy of the tiny VLM's folder."""
    return Path(shutil.copytree(model_config.vlm, tmp_path / "vlm"))
