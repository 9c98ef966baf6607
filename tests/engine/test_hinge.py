"""A run in which the hinge never acts says so, once."""

from __future__ import annotations

import pytest

from w2r2_ds.config import ObjectiveConfig, RunConfig
from w2r2_ds.engine import hinge
from w2r2_ds.engine.hinge import PATIENCE, HingeWatch


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> HingeWatch:
    monkeypatch.setattr(hinge.dist, "get_rank", lambda: 0)
    return HingeWatch(20, RunConfig(objective=ObjectiveConfig(mu=0.9)))


def see(watch: HingeWatch, steps: int, above: float = 0.0) -> None:
    for step in range(steps):
        watch.see(watch.start + step + 1, {"above_mu": above, "s_short": 0.25 + 0.001 * step})


def test_it_speaks_after_its_patience_and_not_again(watch: HingeWatch, capsys: pytest.CaptureFixture[str]) -> None:
    see(watch, PATIENCE - 1)
    assert capsys.readouterr().out == ""
    see(watch, PATIENCE)
    watch.end()
    out = capsys.readouterr().out
    assert out.count("warning:") == 1
    for part in (f"in {PATIENCE} steps", "objective.mu = 0.9", "highest mean s 0.349", "push margin"):
        assert part in out


def test_a_short_run_is_warned_of_at_its_end(watch: HingeWatch, capsys: pytest.CaptureFixture[str]) -> None:
    see(watch, 3)
    watch.end()
    assert "in 3 steps" in capsys.readouterr().out


def test_one_active_sample_is_enough(watch: HingeWatch, capsys: pytest.CaptureFixture[str]) -> None:
    see(watch, 3)
    watch.see(watch.start + 4, {"above_mu": 0.01, "s_short": 0.3})
    see(watch, PATIENCE)
    watch.end()
    assert capsys.readouterr().out == ""


def test_other_ranks_and_runs_without_a_step_are_silent(
    watch: HingeWatch, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    watch.end()
    monkeypatch.setattr(hinge.dist, "get_rank", lambda: 1)
    see(watch, PATIENCE)
    assert capsys.readouterr().out == ""
