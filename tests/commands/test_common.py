"""The environment of a command."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from w2r2_ds.commands.common import ALLOCATOR_VARIABLES, command_words, use_expandable_segments

CURRENT = "PYTORCH_ALLOC_CONF"


def test_segments_are_expandable(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ALLOCATOR_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(CURRENT, "")
    command_words([])
    assert os.environ[CURRENT] == "expandable_segments:True"


@pytest.mark.parametrize("name", ALLOCATOR_VARIABLES)
def test_the_users_setting_stays(name: str) -> None:
    environment = {name: "max_split_size_mb:512"}
    use_expandable_segments(environment)
    assert environment == {name: "max_split_size_mb:512"}


@pytest.mark.parametrize("command", ["train", "evaluate", "prepare", "bench"])
def test_it_is_set_before_torch_is_imported(command: str) -> None:
    program = (
        "import os, sys; from w2r2_ds.commands import common; stock = common.use_expandable_segments\n"
        "def check(environment): assert 'torch' not in sys.modules; stock(environment); print('set'); sys.exit(0)\n"
        f"common.use_expandable_segments = check; from w2r2_ds.commands.{command} import main; main([])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout == "set\n", done.stderr
