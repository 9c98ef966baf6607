"""Log messages: level and prefix by rank, escaped untrusted text, a full disk."""

from __future__ import annotations

import logging
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from runs import environment
from w2r2_ds.utils.distributed import RankInfo
from w2r2_ds.utils.logging import LOGGER, setup_logging

PROGRAM = """
import resource, sys
from w2r2_ds.utils.logging import ignore_write_errors
{call}
print("before", flush=True)
resource.setrlimit(resource.RLIMIT_FSIZE, (16, resource.RLIM_INFINITY))  # EFBIG; Python ignores SIGXFSZ
print("a warning that is longer than the limit", flush=True)
print("another", file=sys.stderr, flush=True)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
open(sys.argv[1], "w").write("reached")
"""


def run(folder: Path, call: str) -> int:
    with open(folder / "log", "w") as log:
        command = [sys.executable, "-c", PROGRAM.format(call=call), str(folder / "end")]
        return subprocess.run(command, stdout=log, stderr=log, env=environment(), check=False).returncode


def test_deepspeed_does_not_write_to_standard_output() -> None:
    """Its warnings go to standard error, except the one about a missing GPU; standard output has only JSON."""
    code = "from w2r2_ds.utils.logging import setup_logging\nsetup_logging()\nsetup_logging()\nimport deepspeed\n"
    code += "from deepspeed.utils import logger\nlogger.warning('a warning of its own')\nprint('{}')"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout == "{}\n"
    assert done.stderr.count("a warning of its own") == 1 and "accelerator" not in done.stderr


def test_a_full_disk_under_the_log_does_not_end_the_program(tmp_path: Path) -> None:
    assert run(tmp_path, "ignore_write_errors('stdout', 'stderr')") == 0
    assert (tmp_path / "end").read_text() == "reached"
    assert (tmp_path / "log").read_text().startswith("before\n")


def test_without_ignore_write_errors_the_program_ends(tmp_path: Path) -> None:
    assert run(tmp_path, "") != 0
    assert not (tmp_path / "end").exists()


@pytest.fixture(autouse=True)
def logger() -> Iterator[logging.Logger]:
    logger = logging.getLogger(LOGGER)
    before = logger.handlers, logger.level
    yield logger
    logger.handlers, logger.level = before


def test_levels_and_prefix_by_rank(capsys: pytest.CaptureFixture[str], logger: logging.Logger) -> None:
    for ranks in (RankInfo(), RankInfo(0, 2, 0, 2), RankInfo(1, 2, 1, 2)):
        setup_logging(ranks)
        logger.getChild("part").info("info")
        logger.getChild("part").warning("warning")
    out, err = capsys.readouterr()
    assert out == "", "standard output is left to results"
    assert [line.split(" ", 1)[1] for line in err.splitlines()] == [
        "INFO info",
        "WARNING warning",
        "[rank 0] INFO info",
        "[rank 0] WARNING warning",
        "[rank 1] WARNING warning",
    ]


def test_untrusted_text_is_escaped(
    capsys: pytest.CaptureFixture[str], logger: logging.Logger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "a-very-secret-value")
    setup_logging(RankInfo())
    logger.warning("scene \x1b[31m\nINFO forged a-very-secret-value")
    first, second = capsys.readouterr().err.splitlines()
    assert r"\x1b[31m" in first and second == "  INFO forged [hidden]"


def test_deprecations_between_libraries_are_not_shown() -> None:
    with warnings.catch_warnings(record=True) as shown:
        setup_logging(RankInfo())
        for module in ("transformers.modeling_utils", "torch.distributed.c10d_logger", "my_plugin", "torchvision_like"):
            warnings.warn_explicit("old", FutureWarning, f"{module}.py", 1, module)
        warnings.warn_explicit("careful", UserWarning, "torch.py", 1, "torch.nn")
    assert [(warning.filename, warning.category) for warning in shown] == [
        ("my_plugin.py", FutureWarning),
        ("torchvision_like.py", FutureWarning),
        ("torch.py", UserWarning),
    ]
