"""metrics.jsonl and the progress line. Trackers are tested in test_trackers.py."""

from __future__ import annotations

import io
import json
import resource
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from rich.console import Console

import w2r2_ds.training.progress_line as progress_line
from w2r2_ds.training.metrics import MetricsLogger, memory_gib, read_metrics
from w2r2_ds.training.progress_line import ProgressLine

VALUES = {"loss": 1.5, "align": 1.25, "push": 0.25, "samples_per_s": 8.0, "tokens_per_s": 1234.5, "lr": 1e-4}


def read(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_each_step_is_flushed(tmp_path: Path) -> None:
    with MetricsLogger(tmp_path / "new", 3) as logger:
        logger.start(0)
        for step in (1, 2, 3):
            logger.log(step, VALUES)
            assert [line["step"] for line in read(tmp_path / "new")] == list(range(1, step + 1))
    line = read(tmp_path / "new")[0]
    assert {name: line[name] for name in VALUES} == VALUES
    assert line["memory_gib"] > 0


def test_other_ranks_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with MetricsLogger(tmp_path, 3, rank=1) as logger:
        logger.start(0)
        logger.log(1, VALUES)
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().out == ""


def test_a_resumed_file_has_no_duplicate_or_incomplete_line(tmp_path: Path) -> None:
    with MetricsLogger(tmp_path, 6) as logger:
        logger.start(0)
        for step in range(1, 5):
            logger.log(step, VALUES)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    with MetricsLogger(tmp_path, 6) as logger:
        logger.start(2)
        for step in range(3, 7):
            logger.log(step, VALUES | {"loss": 9.0})
    lines = read(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["loss"] for line in lines] == [1.5, 1.5, 9.0, 9.0, 9.0, 9.0]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_another_file_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("hello\n")
    with pytest.raises(ValueError, match=r"metrics.jsonl: line 1 "):
        MetricsLogger(tmp_path, 3).start(0)
    assert (tmp_path / "metrics.jsonl").read_text() == "hello\n"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "1.0", None, True])
def test_non_finite_numbers_raise(tmp_path: Path, value: Any) -> None:
    with MetricsLogger(tmp_path, 3) as logger:
        logger.start(0)
        logger.log(1, VALUES)
        with pytest.raises(ValueError, match=r"The metric loss of step 2 is .* must be a finite number"):
            logger.log(2, {"loss": value})
    assert len(read(tmp_path)) == 1


def test_steps_that_do_not_increase_raise(tmp_path: Path) -> None:
    with MetricsLogger(tmp_path, 9) as logger:
        logger.start(4)
        with pytest.raises(ValueError, match="Step 4 was logged after step 4"):
            logger.log(4, VALUES)
        logger.log(5, VALUES)


def test_log_before_start_raises_assertion_error(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="start is called before log"):
        MetricsLogger(tmp_path, 3).log(1, VALUES)


def test_progress_without_a_terminal_is_a_line_every_few_steps(tmp_path: Path) -> None:
    out = io.StringIO()
    line = ProgressLine(200, 0, Console(file=out))
    for step in range(1, 201):
        line.update(step, VALUES | {"memory_gib": 2.0})
    line.close()
    lines = out.getvalue().splitlines()
    assert len(lines) == 51 and "\x1b" not in out.getvalue()
    assert lines[0] == ("step 1/200  loss 1.5  align 1.25  push 0.25  8 samples/s  1,234 tokens/s  2.00 GiB  ETA ?")
    assert lines[-1].startswith("step 200/200") and lines[-1].endswith("ETA 0:00:00")


def test_mfu_is_on_the_progress_line() -> None:
    text = ProgressLine(4, 0, Console(file=io.StringIO())).text(2, VALUES | {"memory_gib": 2.0, "mfu": 0.456})
    assert "  1,234 tokens/s  MFU 46%  2.00 GiB  " in text


def test_memory_metric_is_the_peak() -> None:
    """On a CPU, memory that was released still counts."""
    if torch.cuda.is_available():
        pytest.skip("counts the GPU's memory")
    held = torch.ones(2**24)  # 64 MiB
    high = psutil.Process().memory_info().rss / 2**30
    del held
    assert memory_gib() >= high - 0.01  # the kernel counts pages in batches


def test_progress_bar_in_a_terminal(tmp_path: Path) -> None:
    out = io.StringIO()
    line = ProgressLine(4, 1, Console(file=out, force_terminal=True, width=200))
    for step in (2, 3, 4):
        line.update(step, VALUES | {"memory_gib": 2.0})
    line.close()
    assert "step 4/4" in out.getvalue()


def test_eta_ignores_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 110.0, 130.0])
    monkeypatch.setattr(progress_line.time, "monotonic", lambda: next(clock))
    line = ProgressLine(1000, 500, Console(file=io.StringIO()))
    assert line.eta(501) == "?"
    assert line.eta(502) == "1:23:00"
    assert line.eta(503) == "2:04:15"


def test_a_full_disk_warns_once_and_lines_are_written_later(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],  # else pytest's own capture file would be too large
) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with MetricsLogger(tmp_path, 9) as logger:
        logger.start(0)
        logger.log(1, VALUES)
        resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "metrics.jsonl").stat().st_size + 9, hard))
        try:
            logger.log(2, VALUES)
            logger.log(3, VALUES)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        # The second line is incomplete, like that of a killed run.
        assert [step for step, _ in read_metrics(tmp_path / "metrics.jsonl")] == [1]
        logger.log(4, VALUES)
        assert [line["step"] for line in read(tmp_path)] == [1, 2, 3, 4]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert str(tmp_path / "metrics.jsonl") in caplog.text and "File too large" in caplog.text


def test_an_old_launch_writes_to_the_old_file(tmp_path: Path) -> None:
    first, second = MetricsLogger(tmp_path, 9), MetricsLogger(tmp_path, 9)
    first.start(0)
    first.log(1, VALUES)
    second.start(1)
    first.log(2, VALUES | {"loss": 9.0})
    second.log(2, VALUES)
    first.close()
    second.close()
    assert [(line["step"], line["loss"]) for line in read(tmp_path)] == [(1, 1.5), (2, 1.5)]
