"""``launchers/prepare.py geometry`` fills the cache before training, continues, and checks the space first."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fork_server import ROOT, environment
from runs import World
from w2r2_ds.commands import prepare
from w2r2_ds.config.io import DEMO_RECIPE, load_config
from w2r2_ds.config.schema import RunConfig
from w2r2_ds.data.loader import make_collate, make_processor
from w2r2_ds.data.prepare import features as fill
from w2r2_ds.data.prepare.features import fill_cache
from w2r2_ds.features.store import FeatureStore
from w2r2_ds.models.build import build_model, load_frontend
from w2r2_ds.models.feature_cache import open_cache
from w2r2_ds.utils.distributed import RankInfo


@pytest.fixture
def config(world: World, tmp_path: Path) -> Callable[..., RunConfig]:
    """Function `config(**changes)`: a run that caches both kinds of features; two rooms to train, one to validate."""

    def make(**changes: object) -> RunConfig:
        given = {"data__cache": tmp_path / "cache", "data__cached_features": "geometry+2d", **changes}
        return load_config(DEMO_RECIPE, world.arguments(tmp_path / "run", **given))

    return make


def files(config: RunConfig) -> list[Path]:
    return sorted(Path(config.data.cache).rglob("*.safetensors"))


def test_cropped_frames_are_reported(
    config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sizes = {Path("wide.jpg"): (4, 3), Path("high.jpg"): (3, 4)}
    monkeypatch.setattr(fill, "read_sizes", lambda samples: sizes)
    for fit, reported in (("crop", True), ("pad", False)):
        caplog.clear()
        fill_cache(config(data__frame_fit=fit), ["train"], True, RankInfo())
        assert ("high.jpg" in caplog.text and "1 of 2 frames" in caplog.text) == reported


def test_prepared_features_equal_those_of_training(
    config: Callable[..., RunConfig], capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Every frame set once; a second call computes only damaged files again, and adds another split."""
    run = config()
    fill_cache(run, ["train"], True, RankInfo())
    assert "features of data.train: 4 files, " in capsys.readouterr().out and not files(run)
    fill_cache(run, ["train"], False, RankInfo())
    assert "complete" in capsys.readouterr().out and len(files(run)) == 4
    fill_cache(run, ["train", "val"], False, RankInfo())
    assert "data.train, data.val: 6 files" in capsys.readouterr().out and len(files(run)) == 6
    inodes = {path: path.stat().st_ino for path in files(run)}
    damaged = files(run)[3]
    damaged.write_bytes(damaged.read_bytes()[:-1])
    fill_cache(run, ["train", "val"], False, RankInfo())
    printed = capsys.readouterr().out
    assert f"{damaged} is damaged" in caplog.text and "missing in" in printed and ": 1 files" in printed
    assert {path for path in files(run) if path.stat().st_ino != inodes[path]} <= {damaged} and len(files(run)) == 6
    fill_cache(run, ["train", "val"], False, RankInfo())
    assert ": 0 files, 0 GiB (free" in capsys.readouterr().out

    model = build_model(run.model, torch.device("cpu"), 0).eval()
    frontend = load_frontend(run.model)
    with_cache = replace(frontend, cache=open_cache(run.data, run.model))
    for split in ("train", "val"):
        for sample in fill.frame_sets(run, [split]):
            cached, computed = (
                make_collate(each, run.data, False)([make_processor(each, run.data)(sample, True)]).visuals
                for each in (with_cache, frontend)
            )
            assert cached.geometry_frames == (None,) and cached.uncached == (None,)
            for one, other in zip(model.encode_3d(cached), model.encode_3d(computed), strict=True):
                assert torch.equal(one, other)
            both = [torch.cat(model.encode_2d(each).pooler_output) for each in (cached, computed)]
            assert torch.equal(*both)


def test_features_that_could_not_be_written_are_an_error(
    config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another run's files may fill the cache, and a disk may fail."""
    real = FeatureStore.write
    monkeypatch.setattr(FeatureStore, "write", lambda self, key, *rest: key[0] in "01234567" and real(self, key, *rest))
    run = config()
    with pytest.raises(ValueError, match=r"cache lacks \d of the 4 files .*data.cache_gib"):
        fill_cache(run, ["train"], False, RankInfo())
    assert "complete" not in capsys.readouterr().out and 0 < len(files(run)) < 4


@pytest.mark.parametrize("cached", ["geometry", "geometry+2d"])
@pytest.mark.parametrize("visual", ["images", "video"])
def test_the_forecast_is_the_size_of_the_files(
    config: Callable[..., RunConfig], visual: str, cached: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is computed from the sizes of the frames, and is larger by at most a header per file."""
    run = config(data__visual=visual, data__cached_features=cached, demo__frames=3)
    forecast: list[fill.FileCount] = []
    real = fill.check_space
    fill.check_space = lambda cache, total, missing: forecast.append(missing)  # type: ignore[assignment]
    try:
        fill_cache(run, ["train"], False, RankInfo())
    finally:
        fill.check_space = real
    written = sum(path.stat().st_size for path in files(run))
    assert forecast[0].files == len(files(run)) == (2 if cached == "geometry" else 4)
    assert written <= forecast[0].bytes <= written + 4096 * forecast[0].files


def test_too_little_space(config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"more than data\.cache_gib = 1e-05; raise it, or fill the cache for fewer"):
        fill_cache(config(data__cache_gib=1e-5), ["train"], False, RankInfo())
    older = Path(config().data.cache) / "00" / f"{0:064x}.safetensors"  # of other weights
    older.parent.mkdir(parents=True)
    older.write_bytes(b"x" * 1_070_000)
    with pytest.raises(ValueError, match=r"data\.cache_gib"):
        fill_cache(config(data__cache_gib=1e-3), ["train"], False, RankInfo())
    older.unlink()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10_000))
    with pytest.raises(ValueError, match=r"cache has 9\.31e-06 GiB free, but the missing features need .*; make room"):
        fill_cache(config(), ["train"], False, RankInfo())
    assert not files(config())
    with pytest.raises(ValueError, match=r"data\.cache is empty; .*--data\.cache runs/cache"):
        fill_cache(config(data__cache="", data__cached_features="geometry"), ["train"], False, RankInfo())


def test_an_unreadable_frame_raises_with_its_path(
    config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = config()
    (first, *rest) = fill.frame_sets(run, ["train"])
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(first.frames[0].read_bytes()[:-400])  # its header is complete
    samples = [replace(first, frames=(broken, *first.frames[1:])), *rest]
    monkeypatch.setattr(fill, "frame_sets", lambda config, splits: samples)
    with pytest.raises(ValueError, match=r"Frame .*broken\.jpg cannot be read as a colour image"):
        fill_cache(run, ["train"], False, RankInfo())


def test_the_command_accepts_the_options_of_a_run(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also after the --local_rank that the deepspeed launcher writes first; an unknown option is one sentence."""
    options = [*world.arguments(tmp_path / "run"), "--data.cache", str(tmp_path / "cache")]
    seen: list[Any] = []
    monkeypatch.setattr(fill, "fill_cache", lambda *given: seen.append(given))
    monkeypatch.setattr(sys, "argv", ["prepare.py", "--local_rank=0", "geometry", *options, "--splits", "[val]"])
    assert prepare.main() == 0
    monkeypatch.setattr(sys, "argv", ["prepare.py", "geometry", *options, "--dry-run"])
    assert prepare.main() == 0
    assert [(splits, dry) for _, splits, dry, _ in seen] == [(["val"], False), (["train", "val"], True)]
    assert seen[0][0].data.cache == str(tmp_path / "cache") and seen[0][3] == RankInfo()
    monkeypatch.setattr(sys, "argv", ["prepare.py", "geometry", "--data.cach", "x"])
    with pytest.raises(SystemExit):
        prepare.main()
    assert "there is no option --data.cach (did you mean --data.cache" in capsys.readouterr().err


@pytest.mark.nightly
@pytest.mark.distributed
def test_ranks_split_the_frame_sets(config: Callable[..., RunConfig], world: World, tmp_path: Path) -> None:
    """With torchrun, then with deepspeed on the same cache, which has nothing left to compute."""
    options = [*world.arguments(tmp_path / "run"), "--data.cache", str(tmp_path / "cache")]
    both = [*options, "--data.cached_features", "geometry+2d"]
    for launcher, words in (
        (["torchrun", "--standalone", "--nproc_per_node", "2"], options),
        (["deepspeed", "--num_accelerators", "2"], both),
    ):
        command = [*launcher, "launchers/prepare.py", "geometry", *words]
        done = subprocess.run(
            command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.count("complete") == 1
    assert len(files(config())) == 6
    assert all(each.features is not None for each in found(config()))


def found(run: RunConfig) -> list[Any]:
    cache = open_cache(run.data, run.model)
    assert cache is not None and isinstance(cache.store, FeatureStore)
    sets = fill.frame_sets(run, ["train", "val"])
    return [each for sample in sets for each in (cache.find_3d(sample.frames), cache.find_2d(sample.frames)) if each]
