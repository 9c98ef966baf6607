"""Payloads that leave a mark where they run, and a model directory to put them into."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


class Runs:
    """A pickle of it calls a function when it is read."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """A file that is there as soon as untrusted code has run."""
    return tmp_path / "ran"


@pytest.fixture
def payload(mark: Path) -> Runs:
    """What leaves the mark when its pickle is read."""
    return Runs(open, str(mark), "w")


@pytest.fixture
def code(mark: Path) -> str:
    """Python that leaves the mark when it is imported, and has the classes that a folder may name."""
    return (
        f"open({str(mark)!r}, 'w').close()\n"
        "from transformers import PreTrainedModel, PreTrainedTokenizer, PretrainedConfig\n"
        "class Config(PretrainedConfig):\n    model_type = 'qwen2_5_vl'\n"
        "class Model(PreTrainedModel):\n    config_class = Config\n"
        "class Tokenizer(PreTrainedTokenizer):\n    pass\n"
    )


@pytest.fixture
def vlm_folder(model_config: Any, tmp_path: Path) -> Path:
    """A copy of the tiny video LLM's directory."""
    return Path(shutil.copytree(model_config.vlm, tmp_path / "vlm"))
