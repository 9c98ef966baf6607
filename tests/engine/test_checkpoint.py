"""Which runs may be gone on with, and what is done to a checkpoint's files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from w2r2_ds.config import DataConfig, RunConfig, SourceConfig, load_config
from w2r2_ds.engine.complete import DESCRIPTION, find_checkpoint
from w2r2_ds.engine.same_run import check_same_data, check_same_run


@pytest.mark.distributed
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("section", "changes"),
    [
        ("train", {"global_batch": 4}),
        ("train", {"lr": 1e-5}),
        ("data", {"frame_width": 112}),
        ("objective", {"lam": 0.5}),
    ],
)
def test_a_resume_with_other_options_is_refused_by_name(trained: Path, section: str, changes: dict[str, Any]) -> None:
    checkpoint = find_checkpoint(trained)
    config = load_config(checkpoint / "config.yaml")
    check_same_run(checkpoint, config)
    other = replace(config, **{section: replace(getattr(config, section), **changes)})
    with pytest.raises(ValueError, match=f"{section}.{next(iter(changes))} = "):
        check_same_run(checkpoint, other)


@pytest.mark.distributed
@pytest.mark.timeout(1200)
def test_a_resume_may_log_and_save_otherwise(trained: Path) -> None:
    checkpoint = find_checkpoint(trained)
    config = load_config(checkpoint / "config.yaml")
    check_same_run(checkpoint, replace(config, train=replace(config.train, save_every=7, keep_last=9, wandb=True)))
    check_same_run(checkpoint, replace(config, objective=replace(config.objective, gap_every=7, gap_samples=3)))
    validated = {"eval_every": 7, "eval_samples": 3, "eval_max_new_tokens": 9, "best_by": "scanrefer/mean_iou"}
    check_same_run(checkpoint, replace(config, train=replace(config.train, **validated)))


def test_a_resume_with_other_samples_is_refused(tmp_path: Path) -> None:
    """Prepared again under the same path, with other options: the configuration is the same, an epoch is not."""
    config = RunConfig(data=DataConfig(root="scans", train=[SourceConfig("a"), SourceConfig("b")]))
    (tmp_path / DESCRIPTION).write_text('{"data": ["1", "2"]}')
    check_same_data(tmp_path, config, ["1", "2"])
    with pytest.raises(ValueError, match=r"scans/b is not the data set that .* was trained on"):
        check_same_data(tmp_path, config, ["1", "3"])
    (tmp_path / DESCRIPTION).write_text("{}")
    check_same_data(tmp_path, config, ["1", "3"])
