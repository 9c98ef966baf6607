"""The run configuration: defaults, ranges, cross-field rules, and the round trip through YAML."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from w2r2_ds.config.io import RECIPES, from_tree, load_config, save_config
from w2r2_ds.config.options import options
from w2r2_ds.config.schema import ObjectiveConfig, RunConfig, SourceConfig

RECIPE = str(RECIPES / "scanrefer_3b.yaml")


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_a_configuration(recipe: Path) -> None:
    config = load_config(recipe)
    assert config.out.startswith("runs/") and config.data.val


def test_a_recipe_does_not_inherit_the_demo() -> None:
    config, defaults = load_config(RECIPE), RunConfig()
    assert not config.demo.enabled and load_config().demo.enabled
    assert (config.objective.mu, config.model.lora_rank) == (defaults.objective.mu, defaults.model.lora_rank)


def test_defaults_are_those_of_the_paper() -> None:
    assert (RunConfig().objective.lambda_det, RunConfig().objective.mu) == (1.5, 0.7)


def test_every_field_has_a_help_text_and_a_default() -> None:
    found = options(RunConfig)
    assert {"out", "train.lr", "model.geometry.layers", "objective.push_term"} <= set(found)
    for option in found.values():
        assert len(option.help.split()) >= 2 and option.help.endswith("."), option
    assert found["train.lr"].default == 1e-4 and found["model.geometry.layers"].default == [22]


def test_data_sources_of_a_mixture() -> None:
    config = load_config(overrides=["--data.train", "[{path: a, weight: 0.5}, {path: b, cap: 7}]"])
    assert config.data.train == [SourceConfig("a", weight=0.5), SourceConfig("b", cap=7)]
    assert config.data.val == load_config().data.val


@pytest.mark.parametrize("value", ["margin", {"name": "margin"}, {}])
def test_a_push_term_has_a_short_form(value: object) -> None:
    assert ObjectiveConfig(push_term=value).push_term == {"name": "margin"}  # type: ignore[arg-type]


def test_hyper_parameters_of_a_push_term(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("objective: {push_term: {name: soft_iou, iou_margin: 0.2}}\n")
    config = load_config(tmp_path / "recipe.yaml", ["--objective.push_term.iou_margin", "0.3"])
    assert config.objective.push_term == {"name": "soft_iou", "iou_margin": 0.3}
    (tmp_path / "recipe.yaml").write_text("objective: {push_term: margin}\n")
    config = load_config(tmp_path / "recipe.yaml", ["--objective.push_term.margin=2"])
    assert config.objective.push_term == {"name": "margin", "margin": 2}


def test_yaml_round_trip(tmp_path: Path) -> None:
    config = load_config(RECIPE, ["--objective.lambda_det", "0.25", "--train.lr", "3e-4"])
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config == from_tree(asdict(config), "here")
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["objective"]["lambda_det"] == 0.25


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("objective.mu", "1.0"),
        ("objective.lambda_det", "-1"),
        ("objective.visual_mask_ratio", "1"),
        ("objective.decode_gap_every", "-1"),
        ("objective.decode_gap_samples", "0"),
        ("train.lr", "0"),
        ("train.steps", "0"),
        ("train.steps", "2.5"),
        ("train.warmup_ratio", "1"),
        ("train.seed", "-1"),
        ("train.pass_order", "parallel"),
        ("train.recompute_every", "2"),  # the demo does not recompute
        ("train.offload_activations", "true"),
        ("data.workers", "-1"),
        ("data.cache_gib", ".inf"),
        ("data.cached_features", "geometry+2d"),
        ("data.questions_per_scene", "3"),
        ("data.train", "[]"),
        ("data.train", "[{path: a, weight: 0}]"),
        ("data.train", "[{path: a, cap: -1}]"),
        ("model.lora_dropout", "1"),
        ("model.attention", "owner/kernel"),
        ("model.geometry.layers", "[]"),
        ("demo.val_scenes", "0"),
        ("out", ""),
    ],
)
def test_values_out_of_range_raise_with_the_field(option: str, value: str) -> None:
    with pytest.raises(ValueError, match=option.replace(".", r"\.")):
        load_config(overrides=[f"--{option}", value])


@pytest.mark.parametrize(
    ("args", "fields"),
    [
        (["--train.eval_every", "5", "--data.val", "[]"], ["data.val", "train.eval_every"]),
        (["--train.pass_order", "lockstep", "--objective.push_term", "unblocked"], ["train.pass_order", "unblocked"]),
        (
            ["--data.questions_per_scene", "2", "--objective.visual_mask_ratio", "0.5"],
            ["objective.visual_mask_ratio", "data.questions_per_scene"],
        ),
    ],
)
def test_contradicting_values_raise(args: list[str], fields: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        load_config(overrides=args)
    assert all(field in str(caught.value) for field in fields)
