"""One warning for a run in which the hinge is always zero."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from objectives import objective_config
from w2r2_ds.config.schema import RunConfig
from w2r2_ds.objective.push_terms import build_push_term
from w2r2_ds.training import hinge_monitor
from w2r2_ds.training.hinge_monitor import PATIENCE, HingeMonitor


def make_monitor(start: int, config: RunConfig) -> HingeMonitor:
    return HingeMonitor(start, config, build_push_term(config.objective.push_term))


@pytest.fixture
def monitor(monkeypatch: pytest.MonkeyPatch) -> HingeMonitor:
    monkeypatch.setattr(hinge_monitor.dist, "get_rank", lambda: 0)
    return make_monitor(0, RunConfig(objective=objective_config(mu=0.9)))


def update(monitor: HingeMonitor, steps: int, above: float = 0.0) -> None:
    for step in range(steps):
        monitor.update({"above_mu": above, "s_short": 0.25 + 0.001 * step})


def test_warns_once_after_patience_steps(monitor: HingeMonitor, caplog: pytest.LogCaptureFixture) -> None:
    update(monitor, PATIENCE - 1)
    assert not caplog.records
    update(monitor, PATIENCE)
    monitor.finish()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    for part in (f"in {PATIENCE} steps", "objective.mu = 0.9", "highest mean s 0.348", "margin"):
        assert part in caplog.text


def test_a_short_run_warns_at_its_end(monitor: HingeMonitor, caplog: pytest.LogCaptureFixture) -> None:
    update(monitor, 3)
    monitor.finish()
    assert "in 3 steps" in caplog.text


def test_one_active_sample_prevents_the_warning(monitor: HingeMonitor, caplog: pytest.LogCaptureFixture) -> None:
    update(monitor, 3)
    monitor.update({"above_mu": 0.01, "s_short": 0.3})
    update(monitor, PATIENCE)
    monitor.finish()
    assert not caplog.records


def test_a_resumed_run_counts_earlier_steps(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logged steps up to the checkpoint count; later ones are of a killed launch and do not."""
    monkeypatch.setattr(hinge_monitor.dist, "get_rank", lambda: 0)
    for active in (0.0, 0.5):
        lines = [{"step": step, "above_mu": 0.0, "s_short": 0.1} for step in range(1, 61)]
        lines[10]["above_mu"] = active
        lines[55]["above_mu"] = 1.0
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        monitor = make_monitor(50, RunConfig(out=str(tmp_path)))
        caplog.clear()
        update(monitor, 50)
        assert (f"in {PATIENCE} steps" in caplog.text) == (active == 0.0)


@pytest.mark.parametrize("changes", [{"push": "poe"}, {"push": "none"}, {"lambda_det": 0.0}])
def test_ungated_push_terms_never_warn(
    changes: dict[str, Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hinge_monitor.dist, "get_rank", lambda: 0)
    monitor = make_monitor(0, RunConfig(objective=objective_config(**changes)))
    update(monitor, PATIENCE)
    monitor.finish()
    assert not caplog.records


@pytest.mark.parametrize("paired", [False, True])
def test_contrast_warns_if_no_sample_is_ever_paired(
    paired: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its condition is a pair, not the hinge, which may be 0."""
    monkeypatch.setattr(hinge_monitor.dist, "get_rank", lambda: 0)
    monitor = make_monitor(0, RunConfig(objective=objective_config(push="contrast")))
    for step in range(PATIENCE):
        monitor.update({"above_mu": 0.0, "s_short": 0.0, "unpaired": 0.9 if paired and step == 7 else 1.0})
    monitor.finish()
    assert [record.levelname for record in caplog.records] == ["WARNING"] * (not paired)
    assert paired or all(part in caplog.text for part in (f"in {PATIENCE} steps", "contrast", "train.micro_batch"))


def test_other_ranks_and_runs_without_a_step_do_not_warn(
    monitor: HingeMonitor, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monitor.finish()
    monkeypatch.setattr(hinge_monitor.dist, "get_rank", lambda: 1)
    update(make_monitor(0, RunConfig()), PATIENCE)
    assert not caplog.records
