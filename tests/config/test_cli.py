"""What is wrong with a command line is one sentence, and names the option that may have been meant."""

from __future__ import annotations

from pathlib import Path

import pytest
from jsonargparse import auto_cli

from w2r2_ds.config.cli import Parser, did_you_mean, plain
from w2r2_ds.config.io import load_config


def said(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """What a wrong command line writes, which is one line, and nothing else."""
    with pytest.raises(SystemExit) as stopped:
        load_config(overrides=list(args))
    assert stopped.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.endswith("; --help lists the options.\n")
    return err


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--objective.lamda", "1"], "there is no option --objective.lamda (did you mean --objective.lambda_det?);"),
        (["--objective.lamda=1"], "there is no option --objective.lamda (did you mean --objective.lambda_det?);"),
        (["--train.step", "5"], "(did you mean --train.steps?);"),
        (["--warmup_step", "5"], "(did you mean --demo.warmup_steps, "),
        (["--zzz", "--objctive.mu", "5"], "no option --zzz; there is no option --objctive.mu (did you mean --objecti"),
        (["--objective.lambda_det", "abc"], ": objective.lambda_det: expected float, got abc;"),
        (["--objective.lambda_det"], ": argument --objective.lambda_det: expected one argument;"),
        (["--data.visual", "film"], ": data.visual: expected Literal['images', 'video'], got film;"),
        (["stray"], "there is no option stray;"),
    ],
)
def test_a_wrong_command_line(capsys: pytest.CaptureFixture[str], args: list[str], sentence: str) -> None:
    assert sentence in said(capsys, *args)


@pytest.mark.parametrize(
    ("recipe", "sentence"),
    [
        ("objective:\n  lamda: 1.0\n", "there is no option objective.lamda (did you mean objective.lambda_det?);"),
        (
            "objctive:\n  lambda_det: 1.0\n",
            "there is no option objctive.lambda_det (did you mean objective.lambda_det",
        ),
        ("objective:\n  lambda_det: [\n", "line 3"),
    ],
)
def test_a_wrong_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str], recipe: str, sentence: str) -> None:
    (tmp_path / "recipe.yaml").write_text(recipe)
    assert sentence in said(capsys, "--config", str(tmp_path / "recipe.yaml"))


def test_a_subcommand_knows_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    def rooms(seed: int = 0) -> None:
        raise AssertionError("it runs")

    with pytest.raises(SystemExit):
        auto_cli({"rooms": rooms}, ["rooms", "--seeed", "3"], as_positional=False, parser_class=Parser)
    assert "rooms: there is no option --seeed (did you mean --seed?);" in capsys.readouterr().err


def test_likeness_is_that_of_the_last_part() -> None:
    known = ["objective.lambda_det", "objective.mu", "model.lora_alpha", "data.root"]
    assert did_you_mean("--lambda_det", known) == " (did you mean --objective.lambda_det?)"
    assert did_you_mean("objective.zzz", known) == ""  # the section alone is no likeness
    assert did_you_mean("dta.root", ["a.root", *known]) == " (did you mean data.root, a.root?)"


def test_types_are_said_without_python() -> None:
    assert plain("Parser key \"a.b\":\n  Expected a <class 'float'>. Got value: x") == "a.b: expected float, got x"
