"""Command lines: precedence of values, and errors in one line that contain the option."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from jsonargparse import auto_cli

from w2r2_ds.config.cli import Parser, did_you_mean, without_python_types
from w2r2_ds.config.io import DEMO_RECIPE, DEMO_RECIPES, RECIPES, load_config, parse_run, run_parser
from w2r2_ds.config.schema import RunConfig

RECIPE = str(RECIPES / "scanrefer_3b.yaml")


def parsed(*args: str) -> RunConfig:
    return parse_run(run_parser("", "w2r2 train"), args)[0]


def error_of(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """The line that a wrong command line prints on stderr."""
    with pytest.raises(SystemExit) as stopped:
        parsed(*args)
    assert stopped.value.code == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("w2r2 train: ")
    return err


def test_help_lists_every_option() -> None:
    text = " ".join(run_parser("").format_help().split())
    assert "--train.lr LR peak learning rate of the LoRA weights. (type: float, default: 0.0001)" in text
    assert "--objective.push_term" in text and "--model.geometry.path" in text


@pytest.mark.parametrize("args", [["--train.steps", "5", "--config", RECIPE], ["--config", RECIPE, "--train.steps=5"]])
def test_the_command_line_takes_precedence_in_any_order(args: list[str]) -> None:
    config = parsed(*args)
    assert config.train.steps == 5
    assert config.model.vlm == "Qwen/Qwen2.5-VL-3B-Instruct"


def test_without_a_recipe_the_demo_runs() -> None:
    assert parsed() == load_config() == load_config(DEMO_RECIPE)
    assert parsed("--out", "x", "--resume", "auto", "--demo.frames", "3").demo.frames == 3


def test_the_geometry_of_the_demo_selects_its_recipe() -> None:
    """The recipes differ in paths and geometry only."""
    vggt, default = parsed("--demo.geometry", "vggt"), parsed("--demo.geometry=point_map")
    assert vggt == load_config(DEMO_RECIPES["vggt"]) == load_config(overrides=["--demo.geometry", "vggt"])
    assert (vggt.model.geometry.name, vggt.demo.geometry, default) == ("vggt", "vggt", load_config(DEMO_RECIPE))
    model = replace(default.model, vlm=vggt.model.vlm, merger=vggt.model.merger, geometry=vggt.model.geometry)
    assert replace(default, out=vggt.out, model=model, demo=vggt.demo) == vggt


@pytest.mark.parametrize("args", [["--train.lr", "1e-4"], ["--model.vlm", "x"], ["--objective.push_term.margin", "2"]])
def test_other_options_need_a_recipe(capsys: pytest.CaptureFixture[str], args: list[str]) -> None:
    error = error_of(capsys, *args)
    assert args[0] in error and "--config" in error


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["--objective.lamda", "1"], ["--objective.lamda", "did you mean --objective.lambda_det"]),
        (["--objective.lamda=1"], ["--objective.lamda", "did you mean --objective.lambda_det"]),
        (["--train.step", "5"], ["did you mean --train.steps"]),
        (["--zzz", "--objctive.mu", "5"], ["--zzz", "--objctive.mu", "--objective.mu"]),
        (["--objective.lambda_det", "abc"], ["objective.lambda_det", "abc"]),
        (["--objective.lambda_det"], ["--objective.lambda_det"]),
        (["--objective.push_term.margin"], ["--objective.push_term.margin"]),
        (["--data.visual", "film"], ["data.visual", "images", "video", "film"]),
        (["--conf", RECIPE], ["--conf"]),
        (["stray"], ["stray"]),
    ],
)
def test_a_wrong_command_line(capsys: pytest.CaptureFixture[str], args: list[str], named: list[str]) -> None:
    error = error_of(capsys, "--config", str(DEMO_RECIPE), *args)
    assert all(word in error for word in named), error


@pytest.mark.parametrize(
    ("recipe", "named"),
    [
        ("objective:\n  lamda: 1.0\n", ["objective.lamda", "objective.lambda_det"]),
        ("objctive:\n  lambda_det: 1.0\n", ["objctive"]),
        ("data: {train: [{path: a, weigth: 2}]}\n", ["data.train[0].weigth"]),
        ("objective:\n  lambda_det: [\n", ["line 3"]),
        ("[a, b]\n", ["list"]),
        ("train: 5\n", ["train", "5"]),
    ],
)
def test_a_wrong_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str], recipe: str, named: list[str]) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe)
    error = error_of(capsys, "--config", str(path))
    assert str(path) in error and all(word in error for word in named), error


def test_a_subcommand_suggests_its_own_options(capsys: pytest.CaptureFixture[str]) -> None:
    def rooms(seed: int = 0) -> None:
        raise AssertionError("it runs")

    with pytest.raises(SystemExit):
        auto_cli({"rooms": rooms}, ["rooms", "--seeed", "3"], as_positional=False, parser_class=Parser)
    assert "rooms: there is no option --seeed (did you mean --seed?);" in capsys.readouterr().err


def test_suggestions_compare_the_last_part_of_an_option() -> None:
    known = ["objective.lambda_det", "objective.mu", "model.lora_alpha", "data.root"]
    assert did_you_mean("--lambda_det", known) == " (did you mean --objective.lambda_det?)"
    assert did_you_mean("objective.zzz", known) == ""  # an equal section is not enough
    assert did_you_mean("dta.root", ["a.root", *known]) == " (did you mean data.root, a.root?)"


def test_messages_do_not_contain_python_types() -> None:
    message = "Parser key \"a.b\":\n  Expected a <class 'float'>. Got value: x"
    assert without_python_types(message) == "a.b: expected float, got x"
