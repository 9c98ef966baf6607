"""Runs of an ablation share options, evaluations and prepared data; others are not mixed with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ablation_runs import FUSED
from fork_server import ROOT
from w2r2_ds.config.io import DEMO_RECIPE, load_config
from w2r2_ds.data.prepared_set import VERSION
from w2r2_ds.diagnostics.ablation.identity import check_identity, data_digests, shared_values, weights_digests
from w2r2_ds.utils import plugins

DIGESTS = {"data/train": "a", "data/val": "b"}


def write_set(folder: Path, **options: Any) -> None:
    """Write the manifest of a prepared set."""
    folder.mkdir(parents=True, exist_ok=True)
    manifest = {"version": VERSION, "task": "scanrefer", "counts": {"samples": 1}, "options": options}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_runs_with_other_settings_are_not_mixed(tmp_path: Path) -> None:
    shared = {"train.steps": 5, "data.val": [{"path": "a"}]}
    check_identity(tmp_path, shared, FUSED, DIGESTS)
    check_identity(tmp_path, shared, FUSED, DIGESTS)
    with pytest.raises(ValueError, match=r"train\.steps was 5 and is 6"):
        check_identity(tmp_path, {**shared, "train.steps": 6}, FUSED, DIGESTS)
    with pytest.raises(ValueError, match=r"data\.val"):
        check_identity(tmp_path, {"train.steps": 5}, FUSED, DIGESTS)


def test_evaluations_can_be_added_but_not_changed(tmp_path: Path) -> None:
    check_identity(tmp_path, {}, FUSED, {})
    check_identity(tmp_path, {}, {"zero": {"geometry": "zero"}}, {})
    with pytest.raises(ValueError, match="evaluation fused"):
        check_identity(tmp_path, {}, {"fused": {"geometry": "shuffle"}}, {})
    with pytest.raises(ValueError, match="evaluation zero"):
        check_identity(tmp_path, {}, {"zero": {"geometry": "zero", "limit": 3}}, {})


def test_sets_can_be_added_but_not_prepared_again(tmp_path: Path) -> None:
    check_identity(tmp_path, {}, FUSED, DIGESTS)
    check_identity(tmp_path, {}, FUSED, {"data/camera": "c"})
    for folder in ("data/val", "data/camera"):
        with pytest.raises(ValueError, match=f"^{folder} .*--out"):
            check_identity(tmp_path, {}, FUSED, {folder: "new"})


@pytest.mark.parametrize("field", ["shared", "evaluations", "data"])
def test_a_file_of_an_older_version_is_named(tmp_path: Path, field: str) -> None:
    check_identity(tmp_path, {}, FUSED, DIGESTS)
    file = tmp_path / "ablation.json"
    values = json.loads(file.read_text())
    del values[field]
    file.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=rf"^{file} .*{field}.*--out"):
        check_identity(tmp_path, {}, FUSED, DIGESTS)


def test_digests_of_all_sets_of_all_arms_and_evaluations(tmp_path: Path) -> None:
    for name in ("train", "other", "val", "camera"):
        write_set(tmp_path / name)
    words = ["--demo.enabled", "false", "--data.root", str(tmp_path), "--data.val", "[{path: val}]"]
    arms = [load_config(DEMO_RECIPE, [*words, "--data.train", f"[{{path: {name}}}]"]) for name in ("train", "other")]
    evaluations = {"iid": {"geometry": "fused"}, "camera": {"data": "camera"}}
    digests = data_digests(arms, evaluations)
    assert set(digests) == {str(tmp_path / name) for name in ("train", "other", "val", "camera")}
    write_set(tmp_path / "val", frames=8)
    again = data_digests(arms, evaluations)
    assert [name for name in digests if digests[name] != again[name]] == [str(tmp_path / "val")]
    (tmp_path / "camera" / "manifest.json").unlink()
    with pytest.raises(ValueError, match="camera"):
        data_digests(arms, evaluations)


def test_digests_of_the_weights_of_all_arms(tmp_path: Path) -> None:
    merger = tmp_path / "merger.safetensors"
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        save_file({"weight": torch.ones(2)}, tmp_path / name / "model.safetensors")
    merger.write_bytes(b"first")
    words = ["--demo.enabled", "false", "--model.merger", str(merger)]
    arms = [
        load_config(DEMO_RECIPE, [*words, "--model.vlm", vlm]) for vlm in (*map(str, tmp_path.glob("[ab]")), "hub/id")
    ]
    digests = weights_digests(arms)
    assert set(digests) == {str(tmp_path / "a"), str(tmp_path / "b"), str(merger)}
    merger.write_bytes(b"second")
    save_file({"weight": torch.zeros(2)}, tmp_path / "b" / "model.safetensors")
    again = weights_digests(arms)
    assert {name for name in digests if digests[name] != again[name]} == {str(tmp_path / "b"), str(merger)}


def test_options_of_single_runs_are_not_shared() -> None:
    base = load_config(DEMO_RECIPE, ["--train.steps", "7"])
    shared = shared_values(base, str(ROOT / "ds_configs" / "zero3.json"), [])
    assert shared["train.steps"] == 7 and "zero_optimization" in shared["deepspeed"]
    assert not {"out", "resume", "train.seed"} & shared.keys()


def test_runs_with_an_edited_plugin_are_not_mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugins, "IMPORTED", [])
    base, file = load_config(DEMO_RECIPE, []), tmp_path / "extra.py"

    def check() -> None:
        plugins.import_plugin(str(file))
        check_identity(tmp_path, shared_values(base, str(ROOT / "ds_configs" / "zero3.json"), [str(file)]), FUSED, {})

    file.write_text("A = 1\n")
    check()
    check()
    file.write_text("A = 2\n")
    with pytest.raises(ValueError, match=rf"ablation\.json: plugin {file} was"):
        check()
