"""Options that a resumed run may change, the size limit of a checkpoint, and its publication."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from w2r2_ds.config.io import load_config
from w2r2_ds.config.schema import DataConfig, RunConfig, SourceConfig
from w2r2_ds.training.checkpoint import save
from w2r2_ds.training.checkpoint.compat import check_same_data, check_same_run
from w2r2_ds.training.checkpoint.manifest import find_checkpoint, write_manifest
from w2r2_ds.training.checkpoint.save import check_size, replace_folder
from w2r2_ds.utils.files import atomic_io
from w2r2_ds.utils.files.atomic_io import Digest


@pytest.mark.distributed
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("section", "changes"),
    [
        ("train", {"global_batch": 4}),
        ("train", {"lr": 1e-5}),
        ("data", {"frame_width": 112}),
        ("objective", {"lambda_det": 0.5}),
        ("model", {"fusion": "gated"}),
    ],
)
def test_resuming_with_other_options_raises_with_the_option(
    trained: Path, section: str, changes: dict[str, Any]
) -> None:
    saved = find_checkpoint(trained)
    config = load_config(saved / "config.yaml")
    check_same_run(saved, config)
    other = replace(config, **{section: replace(getattr(config, section), **changes)})
    with pytest.raises(ValueError, match=f"{section}.{next(iter(changes))} = "):
        check_same_run(saved, other)


@pytest.mark.distributed
@pytest.mark.timeout(1200)
def test_resuming_may_change_logging_saving_and_paths(trained: Path) -> None:
    saved = find_checkpoint(trained)
    config = load_config(saved / "config.yaml")
    check_same_run(saved, replace(config, train=replace(config.train, save_every=7, keep_last=9, trackers=["wandb"])))
    exact = {
        "pass_order": "lockstep",
        "activation_checkpointing": True,
        "recompute_every": 3,
        "offload_activations": True,
        "shard_vision_tower": False,
    }
    check_same_run(saved, replace(config, train=replace(config.train, **exact)))
    check_same_run(
        saved, replace(config, objective=replace(config.objective, decode_gap_every=7, decode_gap_samples=3))
    )
    moved = replace(config.model, geometry=replace(config.model.geometry, path="/moved/vggt"))
    check_same_run(saved, replace(config, model=moved))
    validated: dict[str, Any] = {
        "samples_every": 5,
        "report": True,
        "eval_every": 7,
        "eval_samples": 3,
        "eval_max_new_tokens": 9,
        "best_by": "scanrefer/mean_iou",
    }
    check_same_run(saved, replace(config, train=replace(config.train, **validated)))


def test_a_resume_with_other_samples_is_rejected(tmp_path: Path) -> None:
    """Prepared again in the same folder with other options: the configuration is the same, the samples are not."""
    config = RunConfig(data=DataConfig(root="scans", train=[SourceConfig("a"), SourceConfig("b")]))
    write_manifest(tmp_path, {"data": ["1", "2"]}, {})
    check_same_data(tmp_path, config, ["1", "2"])
    with pytest.raises(ValueError, match=r"scans/b is not the data set that .* was trained on"):
        check_same_data(tmp_path, config, ["1", "3"])


def test_a_checkpoint_with_frozen_weights_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """10 trained parameters of 2 * 4 + 12 bytes, and the allowance; the frozen layer exceeds it."""
    monkeypatch.setattr(save.dist, "get_world_size", lambda: 1)
    model: Any = torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.Linear(500, 500).requires_grad_(False))
    most = 10 * (2 * 4 + 12) + 100_000 + 2 * 2_000
    check_size({"a": Digest(most - 8, ""), "b": Digest(8, "")}, model)
    with pytest.raises(AssertionError, match=f"a checkpoint of {most + 1} bytes holds more than the {most}"):
        check_size({"a": Digest(most + 1, "")}, model)
    with pytest.raises(AssertionError, match="holds more"):
        check_size({"frozen": Digest(500 * 501 * 4, "")}, model)


def test_an_old_folder_is_removed_only_after_the_new_one_is_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    final, temporary = tmp_path / "step-000010", tmp_path / "step-000010.01ab.partial"
    for folder, content in ((final, "old"), (temporary, "new")):
        folder.mkdir()
        (folder / "file").write_text(content)
    real = atomic_io.move

    def full(*_: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic_io, "move", full)
    with pytest.raises(OSError, match="No space"):
        replace_folder(temporary, final)
    assert (final / "file").read_text() == "old"
    monkeypatch.setattr(atomic_io, "move", real)
    replace_folder(temporary, final)
    assert (final / "file").read_text() == "new" and [path.name for path in tmp_path.iterdir()] == [final.name]
