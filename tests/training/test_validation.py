"""The fixed validation subset and its split over ranks; the best step, also after a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from w2r2_ds.training.checkpoint.manifest import (
    BEST,
    TENSORS,
    expired_checkpoints,
    find_checkpoint,
    write_manifest,
    write_pointer,
)
from w2r2_ds.training.validation import BestSoFar, draw_subset, rank_subset


class Scripted:
    """Stub of a validation with given values."""

    best_by = "scanrefer/acc@0.25"

    def __init__(self, *values: float | None, about: str = "3 samples") -> None:
        self.values, self.about = list(values), about

    def measure(self, engine: Any) -> dict[str, float]:
        value = self.values.pop(0)
        return {"scanrefer/parsed": 1.0} | ({} if value is None else {self.best_by: value})


def saved(run: Path, step: int, best: dict[str, Any] | None = None) -> Path:
    """A checkpoint folder with the files that these tests read."""
    path = run / "checkpoints" / f"step-{step:06d}"
    path.mkdir(parents=True)
    for name in (TENSORS, "config.yaml"):
        (path / name).touch()
    write_manifest(path, {"step": step, "best": best}, {})
    return path


def known(value: float, step: int, about: str = "3 samples") -> dict[str, Any]:
    return {"metric": Scripted.best_by, "value": value, "step": step, "about": about}


def test_the_subset_depends_on_the_seed_only() -> None:
    assert draw_subset(50, 8, 3) == draw_subset(50, 8, 3) != draw_subset(50, 8, 4)
    assert len(set(draw_subset(50, 8, 3))) == 8
    assert sorted(draw_subset(5, 8, 3)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize(("count", "micro"), [(1, 1), (3, 2), (8, 4), (7, 1)])
def test_ranks_have_equally_many_batches_and_each_sample_counts_once(world: int, count: int, micro: int) -> None:
    shares = [rank_subset(count, micro, rank, world) for rank in range(world)]
    assert len({len(each.indices) for each in shares}) == 1 and len(shares[0].indices) % micro == 0
    counted = [i for each in shares for i, once in zip(each.indices, each.once, strict=True) if once]
    assert sorted(counted) == list(range(count))


def test_a_batch_is_the_same_for_every_number_of_ranks() -> None:
    """Left padding and the order of sums depend on the other samples of a batch."""
    one, two = rank_subset(7, 2, 0, 1), rank_subset(7, 2, 1, 2)
    assert one.indices == [0, 1, 2, 3, 4, 5, 6, 0] and one.once == [True] * 7 + [False]
    assert two.indices == [2, 3, 6, 0] and two.once == [True, True, True, False]


def test_the_best_step_has_the_highest_score_and_ties_keep_the_earlier(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "w2r2_ds")
    best = BestSoFar(Scripted(0.0, 0.5, 0.3, 0.5, None, 0.6), None)
    found = [best.measure(None, step) for step in (10, 20, 30, 40, 50, 60)]
    assert [mark and (mark["step"], mark["value"]) for _, mark in found] == [
        (10, 0.0),
        (20, 0.5),
        *[None] * 3,
        (60, 0.6),
    ]
    assert found[1][0]["val/scanrefer/acc@0.25"] == 0.5 and found[1][0]["val/seconds"] >= 0
    assert "val/scanrefer/acc@0.25" not in found[4][0] and found[4][0]["val/scanrefer/parsed"] == 1.0
    messages = caplog.messages
    assert messages[2].startswith("validation after step 30: scanrefer/acc@0.25 0.3, best 0.5 after step 20, in ")
    assert caplog.records[4].levelname == "WARNING"
    assert "scanrefer/acc@0.25" in messages[4] and "step 50" in messages[4]
    assert len(messages) == 6


def test_a_best_step_whose_save_failed_is_not_recorded() -> None:
    """The disk was full: `checkpoints/best` has the previous one, with which later ones are compared."""
    best = BestSoFar(Scripted(0.5, 0.9, 0.6), None)
    assert best.measure(None, 10)[1] == known(0.5, 10)
    assert best.measure(None, 20)[1] == known(0.9, 20)
    best.not_saved()
    assert best.best == known(0.5, 10)
    assert best.measure(None, 30)[1] == known(0.6, 30)


def test_a_resumed_run_keeps_the_best_step(tmp_path: Path) -> None:
    best, last = saved(tmp_path, 20, known(0.5, 20)), saved(tmp_path, 30)
    write_pointer(best.parent / BEST, best)
    resumed = BestSoFar(Scripted(0.5, 0.51), last)
    assert [resumed.measure(None, step)[1] for step in (40, 50)] == [None, known(0.51, 50)]


def test_scores_of_another_subset_are_ignored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    best = saved(tmp_path, 20, known(0.5, 20, about="8 samples"))
    write_pointer(best.parent / BEST, best)
    caplog.set_level("INFO", "w2r2_ds")
    resumed = BestSoFar(Scripted(0.1), best)
    assert "8 samples" in caplog.text
    assert resumed.measure(None, 30)[1] == known(0.1, 30)


def test_a_kill_before_best_is_written_is_repaired(tmp_path: Path) -> None:
    """`latest` was written already, `best` was not."""
    old, new = saved(tmp_path, 20, known(0.5, 20)), saved(tmp_path, 30, known(0.7, 30))
    write_pointer(old.parent / BEST, old)
    assert BestSoFar(Scripted(), new).best == known(0.7, 30)
    assert find_checkpoint(tmp_path / "checkpoints" / BEST) == new


@pytest.mark.parametrize("there", [True, False])
def test_a_missing_or_later_best_is_ignored(tmp_path: Path, there: bool) -> None:
    """As after newer checkpoints were deleted by hand."""
    later = saved(tmp_path, 40, known(0.9, 40)) if there else tmp_path / "checkpoints" / "step-000040"
    last = saved(tmp_path, 30)
    write_pointer(last.parent / BEST, later)
    assert BestSoFar(Scripted(), last).best is None


def test_the_best_checkpoint_is_kept_besides_the_newest(tmp_path: Path) -> None:
    paths = [saved(tmp_path, step) for step in (10, 20, 30, 40)]
    write_pointer(paths[0].parent / BEST, paths[1])
    assert expired_checkpoints(tmp_path, 1) == [paths[2], paths[0]]


def test_a_run_without_validation_has_no_best(tmp_path: Path) -> None:
    path = saved(tmp_path, 10)
    write_pointer(path.parent / "latest", path)
    assert find_checkpoint(tmp_path) == find_checkpoint(tmp_path / "checkpoints" / "latest") == path
    with pytest.raises(ValueError, match=r"best holds no complete checkpoint.*train\.eval_every"):
        find_checkpoint(tmp_path / "checkpoints" / BEST)
