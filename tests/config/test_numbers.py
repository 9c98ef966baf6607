"""Numbers that no run can use, for every numeric option of the configuration and of the commands."""

from __future__ import annotations

import functools
import re
from typing import Any

import pytest
import yaml

from w2r2_ds.commands import COMMANDS, bench, convert, demo, diagnose, evaluate, export, main, prepare
from w2r2_ds.commands.common import function_parser
from w2r2_ds.config.io import DEMO_RECIPE, load_config, parse_run, run_parser
from w2r2_ds.config.numbers import MAX_NUMBER, check_numbers
from w2r2_ds.config.options import options
from w2r2_ds.config.schema import RunConfig
from w2r2_ds.training.fault_tolerance.exit_codes import FAILED

BAD = (".inf", "-.inf", ".nan", "1e400", "1.0e+400", str(10**30), "-" + str(10**30))
"""Values as YAML; those without a dot are text to YAML 1.1, which pydantic converts."""
NUMERIC = [name for name, option in options(RunConfig).items() if option.type in ("int", "float")]
NEGATIVE: tuple[str, ...] = ()
"""Options of the configuration that may be negative."""


def test_the_enumeration_finds_the_numeric_options() -> None:
    assert {"train.lr", "train.steps", "data.cache_gib", "objective.mu", "train.hang_seconds"} <= set(NUMERIC)


@pytest.mark.parametrize("name", NUMERIC)
def test_a_number_out_of_range_names_the_option(name: str) -> None:
    for value in [*BAD, *(["-1"] if name not in NEGATIVE else [])]:
        with pytest.raises(ValueError, match=re.escape(name)):
            load_config(DEMO_RECIPE, [f"--{name}={value}"])


@pytest.mark.parametrize(
    "option",
    [
        "--data.train=[{path: a, weight: VALUE}]",
        "--data.train=[{path: a, cap: VALUE}]",
        "--model.geometry.layers=[VALUE]",
        "--objective.push_term.margin=VALUE",
        "--objective.push_term={name: margin, margin: VALUE}",
    ],
)
def test_a_nested_number_out_of_range_names_the_option(option: str) -> None:
    for value in (".inf", ".nan", str(10**30)):
        with pytest.raises(ValueError, match=option.partition("=")[0].removeprefix("--").removesuffix(".margin")):
            load_config(DEMO_RECIPE, [option.replace("VALUE", value)])


def test_a_number_out_of_range_in_a_recipe(tmp_path: Any) -> None:
    tree = yaml.safe_load(DEMO_RECIPE.read_text())
    tree["train"]["lr"] = float("inf")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(ValueError, match=r"recipe\.yaml.*train\.lr"):
        load_config(tmp_path / "recipe.yaml")


def test_a_command_line_ends_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_run(run_parser("", "w2r2 train"), ["--config", str(DEMO_RECIPE), "--train.lr", ".inf"])
    (line,) = capsys.readouterr().err.splitlines()
    assert "train.lr" in line


@functools.cache
def parsers() -> dict[str, Any]:
    """Command with its sub-command -> parser, except those with the options of the configuration."""
    found = {f"prepare {name}": prepare._parser(name) for name in prepare.SUBCOMMANDS if name != "geometry"}
    found |= {f"bench {name}": function_parser(function, name) for name, function in bench.BENCHMARKS.items()}
    found |= {"evaluate": function_parser(evaluate.run, "evaluate", ("protocols",))}
    return found | {"diagnose": function_parser(diagnose.run, "diagnose", ("protocols", "predictions"))}


def numeric_options(parser: Any) -> list[str]:
    """Options that are a number or several."""
    kinds = {
        action.option_strings[0]: str(getattr(action, "_typehint", None) or action.type)
        for action in parser._actions
        if action.option_strings
    }
    return [name for name, kind in kinds.items() if re.search(r"\b(int|float)\b", kind)]


def test_commands_without_numeric_options() -> None:
    """The commands that `parsers` lacks have none."""
    others = [function_parser(function, name) for name, function in convert.CONVERSIONS.items()]
    others += [function_parser(export.run, "export"), function_parser(demo.run, "demo")]
    assert [numeric_options(parser) for parser in others] == [[]] * len(others)
    listed = {words.split()[0] for words in parsers()} | {"convert", "export", "demo"}
    assert listed | {"train", "doctor", "ablate", "report"} == set(COMMANDS)  # parsers of their own


@pytest.mark.parametrize("words", parsers())
def test_a_number_out_of_range_of_a_command(words: str, capsys: pytest.CaptureFixture[str], tmp_path: Any) -> None:
    parser = parsers()[words]
    required = [name for action in parser._actions if action.required for name in action.option_strings]
    found = numeric_options(parser)
    assert found or words == "prepare demo"
    for option in found:
        for value in ("inf", "-inf", "nan", "1e400", str(10**30), "-5"):
            # Two values in lists are enough: elements are checked as single numbers are (`test_check_numbers`).
            for given in (value, f"[{value}, {value}]") if value in ("inf", "-5") else (value,):
                arguments = [*words.split(), *(text for name in required for text in (name, str(tmp_path / "none")))]
                try:
                    assert main([*arguments, f"{option}={given}"]) == FAILED
                except SystemExit as ended:
                    assert ended.code == FAILED
                lines = capsys.readouterr().err.splitlines()
                assert len(lines) == 1 and option.removeprefix("--") in lines[0], (option, given, lines)


def test_zero_of_a_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "kernels", "--rounds", "0"]) == FAILED
    assert "--rounds" in capsys.readouterr().err


@pytest.mark.parametrize("value", [float("nan"), float("inf"), MAX_NUMBER + 1, 10**400, -1, [0, (1, -1)], {"a": [-1]}])
def test_check_numbers(value: object) -> None:
    with pytest.raises(ValueError, match="--name"):
        check_numbers(value, "--name")


def test_other_values_are_not_numbers() -> None:
    check_numbers([True, "1e400", None, 0, MAX_NUMBER, 0.5], "--name")
