"""Trackers: the built-in ones, and one from a plug-in file."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
from PIL import Image

from w2r2_ds.training import metrics, trackers
from w2r2_ds.training.metrics import MetricsLogger
from w2r2_ds.training.trackers import TRACKERS

VALUES = {"loss": 1.5, "lr": 1e-4}

USER_FILE = """
from collections.abc import Mapping
from pathlib import Path

from w2r2_ds.training.trackers import register_tracker


@register_tracker("csv")
class CsvTracker:
    def __init__(self, run_dir: Path, start: int) -> None:
        self.file = (run_dir / "loss.csv").open("a")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        print(step, metrics["loss"], sep=",", file=self.file)

    def finish(self) -> None:
        self.file.close()
"""
PICTURE = Image.new("RGB", (8, 4), (255, 0, 0))


def log_steps(folder: Path, names: list[str], start: int, *steps: int, loss: float = 1.5) -> None:
    with MetricsLogger(folder, 4, names) as logger:
        logger.start(start)
        for step in steps:
            logger.log(step, VALUES | {"loss": loss})


@patch.dict(TRACKERS)
def test_one_file_outside_the_package_adds_a_tracker(tmp_path: Path) -> None:
    file = tmp_path / "csv_tracker.py"
    file.write_text(USER_FILE)
    spec = importlib.util.spec_from_file_location("csv_tracker", file)
    assert spec is not None and spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    log_steps(tmp_path / "run", ["csv"], 0, 1, 2)
    assert (tmp_path / "run" / "loss.csv").read_text() == "1,1.5\n2,1.5\n"


@pytest.mark.parametrize("name", ["wandb", "tensorboard", "trackio"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_missing_package_is_an_error_on_every_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, rank: int
) -> None:
    monkeypatch.setattr(trackers, "import_problem", lambda name: "is not installed")
    with pytest.raises(ValueError, match=rf"train\.trackers: {name} .*w2r2-ds\[{name}\]"):
        MetricsLogger(tmp_path, 3, [name], rank=rank)


@pytest.mark.parametrize("rank", [0, 1])
def test_an_unknown_tracker_is_an_error_on_every_rank(tmp_path: Path, rank: int) -> None:
    with pytest.raises(ValueError, match=r"train\.trackers.*'wandbb'.*wandb"):
        MetricsLogger(tmp_path, 3, ["wandbb"], rank=rank)


def test_tensorboard_has_each_step_once_after_a_resume(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log_steps(tmp_path, ["tensorboard"], 0, 1, 2, 3)
    log_steps(tmp_path, ["tensorboard"], 1, 2, 3, 4, loss=9.0)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1.5), (2, 9.0), (3, 9.0), (4, 9.0)]


@pytest.mark.parametrize(
    ("kind", "words", "part"),
    [
        (
            "UsageError",
            "No API key configured. Use `wandb login` to log in.",
            "configured; Use `wandb login` to log in)",
        ),
        ("CommError", "Timed out while retrying: no such host\nConsider the setting:\n  x=1", "no such host; Consider"),
        ("AuthenticationError", "API key must have 40+ characters, has 5.", "40+ characters, has 5)"),
        # pydantic's error, for WANDB_MODE=nonsense.
        (
            "ValidationError",
            "1 validation error for Settings\nmode\n  Input should be 'online'",
            "mode; Input should be",
        ),
    ],
)
def test_a_failed_wandb_start_raises_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, words: str, part: str
) -> None:
    wandb = pytest.importorskip("wandb")

    # The behaviour of wandb without a key; the real call would change its settings for the next test.
    def fail(**_: object) -> None:
        raise getattr(wandb.errors, kind, ValueError)(words)

    monkeypatch.setattr(wandb, "init", fail)
    with pytest.raises(ValueError) as caught, MetricsLogger(tmp_path, 2, ["wandb"]) as logger:
        logger.start(0)
    sentence = str(caught.value)
    assert sentence.startswith("train.trackers: wandb") and part in sentence and "WANDB_MODE=offline" in sentence
    assert "\n" not in sentence and ". " not in sentence and sentence.endswith(".")


def test_another_rank_does_not_open_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setattr(wandb, "init", lambda **_: pytest.fail("opened"))
    MetricsLogger(tmp_path, 2, ["wandb"], rank=1).start(0)


def test_trackers_are_open_before_the_first_log(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    with MetricsLogger(tmp_path / "new", 3, ["tensorboard"]) as logger:
        logger.start(0)
        assert (tmp_path / "new" / "metrics.jsonl").read_text() == ""
        assert list((tmp_path / "new" / "tensorboard").iterdir())


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    log_steps(tmp_path, ["wandb"], 0, 1, 2)
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_trackio_continues_the_run_of_the_same_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stub of the package, an optional dependency."""
    calls: list[object] = []
    run = SimpleNamespace(
        log=lambda metrics, step: calls.append((step, metrics["loss"])), finish=lambda: calls.append("finish")
    )

    def init(**given: object) -> SimpleNamespace:
        calls.append((given["name"], given["resume"]))
        return run

    stub = ModuleType("trackio")
    stub.__dict__.update(init=init, Image=object)
    monkeypatch.setitem(sys.modules, "trackio", stub)
    monkeypatch.setattr(trackers, "import_problem", lambda name: "")
    log_steps(tmp_path / "mine", ["trackio"], 0, 1)
    log_steps(tmp_path / "mine", ["trackio"], 1, 2)
    assert calls == [("mine", "never"), (1, 1.5), "finish", ("mine", "allow"), (2, 1.5), "finish"]
    assert [json.loads(line)["step"] for line in (tmp_path / "mine" / "metrics.jsonl").open()] == [1, 2]


def log_picture(folder: Path, names: list[str]) -> None:
    with MetricsLogger(folder, 4, names, images=True) as logger:
        logger.start(0)
        logger.log_image(1, PICTURE)
        logger.log(1, VALUES)
        logger.log(2, VALUES)


def test_a_picture_is_a_file_and_in_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log_picture(tmp_path, ["tensorboard"])
    with Image.open(tmp_path / "samples" / "step_1.png") as image:
        assert np.array_equal(np.asarray(image), np.asarray(PICTURE))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (event,) = events.Images("samples")
    assert (event.step, event.width, event.height) == (1, 8, 4)


def test_a_picture_in_wandb_belongs_to_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    logged: list[tuple[int, list[str]]] = []
    monkeypatch.setattr(
        wandb.Run, "log", lambda self, values, step: logged.append((step, [type(v).__name__ for v in values.values()]))
    )
    log_picture(tmp_path, ["wandb"])
    assert logged[0] == (1, ["Image"]) and [step for step, _ in logged] == [1, 1, 2]


def test_other_ranks_write_no_picture(tmp_path: Path) -> None:
    logger = MetricsLogger(tmp_path, 4, rank=1, images=True)
    logger.start(0)
    logger.log_image(1, PICTURE)
    assert not (tmp_path / "samples").exists()


@patch.dict(TRACKERS)
def test_a_tracker_without_pictures_is_an_error_at_the_start(tmp_path: Path) -> None:
    TRACKERS["csv"] = lambda run_dir, start: SimpleNamespace(log=print, finish=print)
    with pytest.raises(ValueError, match=r"train\.samples_every.* csv .*log_image"):
        log_picture(tmp_path, ["csv"])


def test_a_full_disk_does_not_end_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(metrics.atomic_io, "replace", full)
    logger = MetricsLogger(tmp_path, 4, images=True)
    logger.log_image(1, PICTURE)
    assert "step_1.png" in caplog.text and "No space left" in caplog.text
