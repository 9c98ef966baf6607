"""What the end of a run prints about its report, and pictures of samples during training."""

from __future__ import annotations

import logging
import shlex
import shutil
from pathlib import Path

import pytest
from PIL import Image

from html_elements import Elements
from w2r2_ds.commands import report
from w2r2_ds.commands.report import report_of_finished_run
from w2r2_ds.report.collect import read_run
from w2r2_ds.report.page import build_page
from w2r2_ds.report.training_pictures import PICTURES, step_pictures


@pytest.fixture
def trained_run(finished_run: Path, tmp_path: Path) -> Path:
    """A run as it is after training: without evaluations."""
    folder = tmp_path / "a run"
    shutil.copytree(finished_run, folder, ignore=shutil.ignore_patterns("evaluation"))
    return folder


def command_of(folder: Path) -> list[str]:
    return ["w2r2", "report", "--run", str(folder)]


def test_the_command_is_named_without_a_report(trained_run: Path) -> None:
    assert shlex.split(report_of_finished_run(trained_run, write=False)) == command_of(trained_run)
    assert not (trained_run / "report.html").exists()


def test_the_report_is_written(trained_run: Path) -> None:
    assert report_of_finished_run(trained_run, write=True) == str(trained_run / "report.html")
    assert "Curves" in Elements((trained_run / "report.html").read_text()).text


def test_a_missing_package_is_no_error_of_the_run(
    trained_run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("w2r2_ds.utils.packages.import_problem", lambda name: "is not installed")
    assert shlex.split(report_of_finished_run(trained_run, write=True)) == command_of(trained_run)
    assert "pip install 'w2r2-ds[report]'" in caplog.text and not (trained_run / "report.html").exists()


def test_a_failed_report_is_logged_with_its_traceback(
    trained_run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report, "run", fail)
    assert shlex.split(report_of_finished_run(trained_run, write=True)) == command_of(trained_run)
    (record,) = caplog.records
    assert record.levelno == logging.ERROR and record.exc_info is not None and "No space left" in caplog.text
    assert shlex.quote(str(trained_run)) in record.getMessage()


def test_pictures_during_training_are_in_the_report(trained_run: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert step_pictures(trained_run) == []
    (trained_run / "samples").mkdir()
    for step in range(5, 65, 5):
        Image.new("RGB", (40, 20)).save(trained_run / "samples" / f"step_{step}.png")
    (trained_run / "samples" / "step_60.png").write_bytes(b"torn")
    (trained_run / "samples" / "step_final.png").write_bytes(b"another file")
    found = step_pictures(trained_run)
    assert len(found) == PICTURES - 1 and [found[0].step, found[-1].step] == [5, 50] and "step_60.png" in caplog.text
    elements = Elements(build_page([read_run(trained_run, "mine")]))
    assert elements.tags.count("image") == PICTURES - 1 and "Samples during training" in elements.text
