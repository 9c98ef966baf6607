"""Arms of an ablation: combinations, names, folders, command lines, errors."""

from __future__ import annotations

from typing import Any

import pytest

from w2r2_ds.config.io import DEMO_RECIPE, load_config
from w2r2_ds.diagnostics.ablation.grid import MAX_NAME, PRESETS, Arm, arms_of, option_words, parse_grid, preset
from w2r2_ds.objective.push_terms import PUSH_TERMS, build_push_term


def test_every_combination_is_an_arm_and_the_last_option_changes_fastest() -> None:
    arms = arms_of([{"objective.lambda_det": [0, 1.5], "objective.mu": [0.1, 0.7]}])
    assert [arm.name for arm in arms] == [
        "lambda_det=0,mu=0.1",
        "lambda_det=0,mu=0.7",
        "lambda_det=1.5,mu=0.1",
        "lambda_det=1.5,mu=0.7",
    ]
    assert arms[1].options == {"objective.lambda_det": 0, "objective.mu": 0.7}


def test_arms_of_several_grids_are_concatenated_without_repetition() -> None:
    arms = arms_of(
        [
            {"objective.push_term": ["none", "margin"]},
            {"objective.push_term": "none", "objective.visual_mask_ratio": 0.5},
            {"objective.push_term": ["none"]},
        ]
    )
    assert [arm.name for arm in arms] == ["push_term=none", "push_term=margin", "push_term=none,visual_mask_ratio=0.5"]


def test_names_do_not_depend_on_the_other_options_of_the_grid() -> None:
    """A name is a folder: another arm in the grid must not rename those that are trained."""
    (arm,) = arms_of([{"model.vlm": "a", "data.cache": "c", "model.geometry.path": "p", "train.lr": 1e-4}])
    assert arm.name == "cache=c,path=p,vlm=a,lr=0.0001"
    (arm,) = arms_of([{"objective.push_term.margin": 2.5, "objective.push_term": "margin", "data.packing": True}])
    assert arm.name == "packing=true,push_term=margin,push_term.margin=2.5"
    (alone,) = arms_of([{"model.geometry.name": "vggt"}])
    both = arms_of([{"model.geometry.name": "vggt"}, {"objective.push_term.name": "none"}])
    assert [arm.name for arm in both] == [alone.name, "push_term.name=none"] == ["name=vggt", "push_term.name=none"]


def test_an_arm_that_is_written_in_two_ways_is_one_arm() -> None:
    arms = arms_of(
        [
            {"objective.lambda_det": [1, 1.0], "objective.mu": 0.5},
            {"objective.mu": 0.5, "objective.lambda_det": 1.0},
            {"objective.push_term": [{"name": "margin", "margin": 2.0}, {"margin": 2, "name": "margin"}]},
            {"objective.caption_similarity": ["1", 1]},
        ]
    )
    assert [arm.name for arm in arms] == [
        "lambda_det=1,mu=0.5",
        'push_term={"margin": 2, "name": "margin"}',
        'caption_similarity="1"',
    ]
    assert arms[0].options == {"objective.lambda_det": 1, "objective.mu": 0.5}
    assert len(arms_of([{"data.packing": [True, 1, 1.0]}])) == 2  # true is not 1


@pytest.mark.parametrize(
    "options",
    [
        {"objective.push_term": "none"},
        {"objective.push_term": {"name": "margin", "margin": 2.0}},
        {"objective.lambda_det": 0, "train.lr": 1e-05},
        {"data.packing": True, "data.visual": "video"},
        {"data.train": [{"path": "a, b: [c]", "weight": 0.5, "cap": 0}]},
        {"model.vlm": "a b", "train.trackers": ["tensorboard"]},
    ],
)
def test_the_command_line_sets_the_values(options: dict[str, Any]) -> None:
    config = load_config(DEMO_RECIPE, option_words(options))
    for name, expected in options.items():
        found: Any = config
        for part in name.split("."):
            found = getattr(found, part)
        if name == "objective.push_term" and isinstance(expected, str):
            expected = {"name": expected}
        if name == "data.train":
            found = [vars(source) for source in found]
        assert found == expected


def test_a_folder_is_a_safe_name_and_unique() -> None:
    plain, bracket, brace = Arm("lambda_det=0.5,mu=0.7", {}), Arm("train=[a/b]", {}), Arm("train={a/b}", {})
    assert plain.folder == plain.name
    assert bracket.folder != brace.folder and "/" not in bracket.folder + brace.folder
    first, second = Arm("x" * 300 + "1", {}), Arm("x" * 300 + "2", {})
    assert first.folder != second.folder and len(first.folder) == MAX_NAME + 9


def test_presets_are_valid_configurations() -> None:
    counts = {}
    for name in PRESETS:
        arms = arms_of(preset(name, list(PUSH_TERMS)))
        counts[name] = len(arms)
        for arm in arms:
            build_push_term(load_config(DEMO_RECIPE, option_words(arm.options)).objective.push_term)
    assert counts == {"lambda": 5, "mu": 6, "push_terms": len(PUSH_TERMS)}
    assert arms_of(preset("push_terms", ["margin", "none"]))[0].options == {"objective.push_term": "none"}
    assert arms_of(preset("mu"))[0].options == {"objective.push_term": "none"}
    assert arms_of(preset("lambda"))[0].options == {"objective.lambda_det": 0}


@pytest.mark.parametrize(
    ("grid", "named"),
    [
        ({"objective.lamda_det": [1]}, "objective.lambda_det"),
        ({"train.seed": [1, 2]}, "--seeds"),
        ({"out": ["a"]}, "--out"),
        ({"demo.seed": [1]}, "demo.seed"),
        ({"objective.mu": []}, "objective.mu"),
    ],
)
def test_errors_name_the_option(grid: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match="--grid") as error:
        arms_of([grid])
    assert named in str(error.value)


def test_two_arms_with_the_same_name_are_an_error() -> None:
    with pytest.raises(ValueError, match="cache=c,vlm=a"):
        arms_of([{"data.cache": "c,vlm=a"}, {"model.vlm": "a", "data.cache": "c"}])


@pytest.mark.parametrize("text", ["", "3", "[]", "[1]", "{}", "{a: [", "objective.mu"])
def test_a_text_that_is_no_grid(text: str) -> None:
    with pytest.raises(ValueError, match="--grid"):
        parse_grid(text)
    assert parse_grid("{objective.mu: [0.1]}") == [{"objective.mu": [0.1]}]


def test_an_unknown_preset() -> None:
    with pytest.raises(ValueError, match=r"--preset.*lambda"):
        preset("nu")
