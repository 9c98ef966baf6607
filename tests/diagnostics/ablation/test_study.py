"""The study of push terms: its files are valid, and its script decides made-up results as its rule says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ablation_runs import WEIGHTS, make_plan, scene_of, write_checkpoint, write_scores
from docs_scripts import DOCS, docs_script
from hand_records import BOX, beside, grounding
from prepared_sets import write_prepared
from w2r2_ds.commands.evaluate import evaluations_of
from w2r2_ds.config.io import load_config
from w2r2_ds.data.prepared_set import MANIFEST, PreparedSet
from w2r2_ds.data.sources.shortcut_cues import cues_file, write_cues
from w2r2_ds.diagnostics.ablation.decision import INACTIVE, STUDY, TESTED, UNDECIDED, Decision, Rule
from w2r2_ds.diagnostics.ablation.grid import Arm, arms_of, option_words, parse_grid
from w2r2_ds.diagnostics.ablation.plan import evaluation_folder
from w2r2_ds.objective import push_terms
from w2r2_ds.training.metrics import METRICS_FILE
from w2r2_ds.utils.files.hashing import file_sha256

FOLDER = DOCS / "research" / "study"
STARTS, SEEDS, QUESTIONS = ("a", "b"), (0, 1), 6
RULE = Rule(starts=2, seeds=2, questions=QUESTIONS, scenes=5)
GRID = [
    {"objective.push_term": ["none", "margin", "pseudo_label"]},
    {"objective.push_term": "margin", "objective.mu": 0.05},
    {"objective.push_term": "none", "train.steps": 3},
]
ALL = 6
"""Right answers of a run without a wrong one."""
Runs = Mapping[str, int]


@pytest.fixture(scope="module")
def study() -> Any:
    return docs_script("study")


def of(arms: list[Arm], term: str, **more: Any) -> Arm:
    """The arm with a push term and no other options than `more`."""
    wanted = {"objective.push_term": term, **{name.replace("__", "."): value for name, value in more.items()}}
    (found,) = [arm for arm in arms if dict(arm.options) == wanted]
    return found


def write_set(root: Path) -> None:
    """The questions as a shifted split, whose cue is 9 m beside the truth, where wrong answers are."""
    samples = [grounding(ann=str(index), scene=scene_of(index)) for index in range(QUESTIONS)]
    frames = tuple(root / f"{number:05d}.jpg" for number in range(2))
    samples = [replace(sample, frames=frames) for sample in samples]
    cue = [
        {"frame": number, "area": 9.0, "camera": beside(9.0).tolist(), "world": beside(9.0).tolist()}
        for number in range(2)
    ]
    same = {"shift": "camera", "object_id": 1, "parameters": {}, "truth": BOX.tolist(), "paired_truth": BOX.tolist()}
    entries = [
        {"id": each.id, "paired_id": each.id, "scene_id": each.scene_id, "frames": cue, **same} for each in samples
    ]
    file = cues_file(root, "val_camera")
    file.parent.mkdir(parents=True)
    write_cues(file, entries)
    write_prepared(root / "prepared" / "val", samples, root, options={"split": "val_camera"})


def digest(root: Path) -> str:
    """Digest of the prepared set in score files."""
    return file_sha256(root / "prepared" / "val" / MANIFEST)


def write_study(root: Path, right: Mapping[str, Runs], active: float = 0.9, seeds: int = 2) -> Path:
    """Ablations of two starts.

    Args:
        root: working directory; has the prepared set.
        right: arm -> evaluation -> number of right answers; one less in every second run. Other arms are not run.
        active: share of samples in which the hinge is active with mu = 0.1; it is 0.9 with a lower mu.
        seeds: number of seeds of the last start that are finished.
    """
    write_set(root)
    for start in STARTS:
        plan = make_plan(root / "arms" / start, GRID, SEEDS)
        for run in plan.runs:
            if run.arm.name not in right or (start == STARTS[-1] and run.seed >= seeds):
                continue
            write_checkpoint(run.folder)
            for name, count in right[run.arm.name].items():
                hits = max(0, count - (run.seed + STARTS.index(start)) % 2)
                write_scores(evaluation_folder(run, name), [index < hits for index in range(QUESTIONS)], digest(root))
            share = 0.9 if "objective.mu" in run.arm.options else active
            (run.folder / METRICS_FILE).write_text(json.dumps({"step": 1, "above_mu": share, "step_s": 0.5}) + "\n")
        listed = [arm for arm in plan.arms if arm.name in right or arm.name != TERMS["lower"]]
        arms = [{"name": arm.name, "options": dict(arm.options)} for arm in listed]
        (plan.out / "results.json").write_text(json.dumps({"arms": arms}))
    return root / "arms"


ARMS = arms_of(GRID)
TERMS = {"none": of(ARMS, "none").name, "margin": of(ARMS, "margin").name, "pseudo": of(ARMS, "pseudo_label").name}
TERMS |= {"lower": of(ARMS, "margin", objective__mu=0.05).name, "control": of(ARMS, "none", train__steps=3).name}


def right(**counts: int) -> dict[str, Runs]:
    """Right answers of the primary outcome by arm; all have 4 right on unshifted data."""
    return {TERMS[name]: {"camera": count, "iid": 4} for name, count in counts.items()}


def decided(study: Any, root: Path, counts: Mapping[str, Runs], **options: Any) -> tuple[list[Any], Decision]:
    arms = study.read_study(write_study(root, counts, **options), root)
    return arms, study.apply_rule(arms, RULE)


def states(decision: Decision) -> dict[str, str]:
    return {each.name: each.state for each in decision.results}


@pytest.fixture(autouse=True)
def in_the_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Score files have the path of the prepared set relative to the working directory."""
    monkeypatch.chdir(tmp_path)


def test_one_better_arm(study: Any, tmp_path: Path) -> None:
    arms, decision = decided(study, tmp_path, right(none=1, margin=ALL, pseudo=1, control=1))
    assert (decision.decided, decision.default) == (True, TERMS["margin"])
    (margin,) = [arm for arm in arms if arm.name == TERMS["margin"]]
    assert margin.runs.keys() == {(start, seed) for start in STARTS for seed in SEEDS}
    # Of six answers, one is wrong in every second run: 9 m away, clipped, and at the cue.
    assert margin.mean("scores", "camera") == pytest.approx(11 / 12)
    assert margin.mean("position", "camera") == pytest.approx(study.CLIP / 12)
    assert margin.mean("cue", "camera") == pytest.approx(1 / 12)
    assert margin.average("active") == 0.9 and margin.average("step_seconds") == 0.5


def test_no_better_arm(study: Any, tmp_path: Path) -> None:
    arms, decision = decided(study, tmp_path, right(none=3, margin=3, pseudo=3, control=3))
    assert (decision.decided, decision.default) == (True, None)
    assert states(decision)[TERMS["margin"]] == TESTED
    text = study.tables(arms, decision)
    assert "does not change" in text and "not complete" not in text


def test_an_inactive_hinge(study: Any, tmp_path: Path) -> None:
    _, decision = decided(study, tmp_path, right(none=1, margin=ALL, pseudo=1, control=1), active=0.2)
    assert not decision.decided and TERMS["margin"] in decision.reason
    assert states(decision)[TERMS["margin"]] == INACTIVE
    assert states(decision)[TERMS["pseudo"]] == TESTED, "pseudo_label is not gated"


def test_a_term_that_was_run_again_with_a_lower_mu(study: Any, tmp_path: Path) -> None:
    counts = right(none=1, margin=1, lower=ALL, pseudo=1, control=1)
    _, decision = decided(study, tmp_path, counts, active=0.2)
    assert (decision.decided, decision.default) == (True, TERMS["lower"])
    assert TERMS["margin"] not in states(decision)


def test_too_few_seeds(study: Any, tmp_path: Path) -> None:
    arms, decision = decided(study, tmp_path, right(none=1, margin=ALL, pseudo=1, control=1), seeds=1)
    assert (decision.decided, decision.default) == (False, None)
    assert set(states(decision).values()) == {UNDECIDED}
    assert "not complete" in study.tables(arms, decision)


def test_an_arm_without_runs(study: Any, tmp_path: Path) -> None:
    arms, decision = decided(study, tmp_path, right(none=1, margin=ALL, control=1))
    assert not decision.decided and TERMS["pseudo"] in decision.reason
    with pytest.raises(ValueError, match=r"objective\.push_term"):
        study.apply_rule([arm for arm in arms if arm.name != TERMS["control"]], RULE)


def test_runs_on_other_questions_are_an_error(study: Any, tmp_path: Path) -> None:
    folder = write_study(tmp_path, right(none=1, margin=ALL, pseudo=1, control=1))
    run = folder / "b" / "runs" / of(ARMS, "margin").folder / "seed-1"
    write_scores(run / "evaluation" / "iid", [True] * 4, digest(tmp_path))
    with pytest.raises(ValueError, match=r"b/.*seed 1: iid"):
        study.apply_rule(study.read_study(folder, tmp_path), RULE)


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A study of which every arm but the term with a lower mu is finished."""
    return write_study(tmp_path, right(none=1, margin=ALL, pseudo=1, control=1))


def margin_run(folder: Path, start: str) -> Path:
    """A run of an arm that is not read first."""
    run: Path = folder / start / "runs" / of(ARMS, "margin").folder / "seed-1"
    return run


@pytest.mark.parametrize("start", STARTS)
def test_scores_on_other_data_are_an_error(study: Any, tmp_path: Path, written: Path, start: str) -> None:
    """Also if all runs of the start have them."""
    for run in [margin_run(written, "a")] if start == "a" else sorted((written / "b").glob("runs/*/*")):
        write_scores(run / "evaluation" / "camera", [True] * QUESTIONS, "prepared again")
    with pytest.raises(ValueError, match=rf"arms/{start}/.*scores-.*other data \(evaluation camera\)"):
        study.read_study(written, tmp_path)


def test_training_on_other_data_is_an_error(study: Any, tmp_path: Path, written: Path) -> None:
    for run in (written / "b").glob("runs/*/*"):
        shutil.rmtree(run / "checkpoints")
        write_checkpoint(run, data="prepared again")
    with pytest.raises(ValueError, match=r"arms/b/.*checkpoints.*arms/a/.*training"):
        study.read_study(written, tmp_path)


def test_weights_that_were_replaced_within_a_start_are_an_error(study: Any, tmp_path: Path, written: Path) -> None:
    """Starts have weights of their own."""
    runs = sorted((written / "b").glob("runs/*/*"))
    for run in runs:
        shutil.rmtree(run / "checkpoints")
        write_checkpoint(run, vlm="of start b")
    assert len(study.read_study(written, tmp_path)[0].runs) == len(STARTS) * len(SEEDS)
    shutil.rmtree(runs[-1] / "checkpoints")
    write_checkpoint(runs[-1], vlm="replaced")
    with pytest.raises(ValueError, match=rf"{runs[-1].name}/checkpoints.*arms/b/.*vlm_weights"):
        study.read_study(written, tmp_path)


def test_a_set_that_was_prepared_again_is_an_error(study: Any, tmp_path: Path, written: Path) -> None:
    samples = list(PreparedSet(tmp_path / "prepared" / "val", tmp_path))
    write_prepared(tmp_path / "prepared" / "val", samples, tmp_path, options={"split": "val_camera", "decimals": 1})
    with pytest.raises(ValueError, match=r"prepared/val was prepared again.*scores-"):
        study.read_study(written, tmp_path)


def test_answers_to_other_questions_are_an_error(study: Any, tmp_path: Path, written: Path) -> None:
    """Two questions are exchanged; score and digest of the set are unchanged."""
    file = margin_run(written, "b") / "evaluation" / "iid" / "predictions-scanrefer-fused.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join([lines[1], lines[0], *lines[2:]]))
    with pytest.raises(ValueError, match=rf"{file}.*other questions.*prepared/val"):
        study.read_study(written, tmp_path)


def write_diagnosis(run: Path, data: str, weights: str = WEIGHTS) -> None:
    """A diagnosis with the slope 0.5 of x under shift, and the scores beside it."""
    folder = run / "diagnosis"
    write_scores(folder, [True], data, weights)
    numbers = {"x": {"rows": 4, "slope": {"value": 0.5}}}
    causality = {"interventions": {"shift": {"numbers": numbers}}}
    content = {"data": [{"path": "prepared/val", "manifest": data}], "causality": causality}
    (folder / "diagnosis-scanrefer.json").write_text(json.dumps(content))


def test_a_diagnosis_belongs_to_its_run(study: Any, tmp_path: Path, written: Path) -> None:
    for start in STARTS:
        write_diagnosis(margin_run(written, start), "of val")
    (margin,) = [arm for arm in study.read_study(written, tmp_path) if arm.name == TERMS["margin"]]
    assert margin.mean("slopes", "shift") == 0.5
    write_diagnosis(margin_run(written, "b"), "prepared again")
    with pytest.raises(ValueError, match=r"arms/b/.*diagnosis-.*other data \(causality\)"):
        study.read_study(written, tmp_path)
    write_diagnosis(margin_run(written, "b"), "of val", "older weights")
    with pytest.raises(ValueError, match=r"arms/b/.*diagnosis-.*other weights"):
        study.read_study(written, tmp_path)


def test_slopes_are_those_of_the_centre(study: Any) -> None:
    numbers = {name: {"rows": 4, "slope": {"value": value}} for name, value in (("x", 0.5), ("y", 0.7), ("size_x", 9))}
    numbers |= {"z": {"rows": 0, "slope": {"value": None}}, "centre": {"rows": 4, "follows": {"value": 1}}}
    found = study.causality_slopes({"interventions": {"shift": {"numbers": numbers}}})
    assert found == {"shift": pytest.approx(0.6)}


def test_document_and_json_are_written(study: Any, tmp_path: Path) -> None:
    folder = write_study(tmp_path, right(none=1, margin=ALL, pseudo=1, control=1))
    arms = study.read_study(folder, tmp_path)
    decision = study.apply_rule(arms, RULE)
    document, file = tmp_path / "study.md", tmp_path / "study.json"
    document.write_text(f"before\n{study.BEGIN}\nold\n{study.END}\nafter\n")
    study.write(study.tables(arms, decision), study.as_json(arms, decision, RULE), document, file)
    text, content = document.read_text(), json.loads(file.read_text())
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert f"New default: `{TERMS['margin']}`" in text
    assert content["default"] == TERMS["margin"] and content["rule"]["effect"] == RULE.effect
    (margin,) = [each for each in content["comparisons"] if each["name"] == TERMS["margin"]]
    assert margin["better"] and margin["difference"]["scenes"] == 5
    with pytest.raises(ValueError, match=r"results\.json"):
        study.read_study(tmp_path / "empty", tmp_path)


def test_the_arms_are_all_push_terms_and_the_other_methods(study: Any) -> None:
    arms = arms_of(parse_grid((FOLDER / "arms.yaml").read_text()))
    built_in = {name for name, term in push_terms.PUSH_TERMS.items() if term.__module__ == push_terms.__name__}
    assert {arm.options["objective.push_term"] for arm in arms} == built_in
    assert dict(arms[0].options) == study.BASELINE
    assert sum(arm.options.keys() == {*study.BASELINE, study.CONTROL} for arm in arms) == 1
    for arm in arms:
        config = load_config(FOLDER / "recipe.yaml", option_words(arm.options))
        push_terms.build_push_term(config.objective.push_term)
    assert load_config(FOLDER / "recipe.yaml", []).objective.mu == study.DEFAULT_MU
    changed = {name for arm in arms for name in arm.options} - {"objective.push_term", "train.steps"}
    augmented = {f"data.geometry_augmentation.{kind}" for kind in ("scale", "shift", "turn")}
    assert changed == augmented | {"objective.visual_mask_ratio"}


def test_the_evaluations_have_the_outcomes(study: Any) -> None:
    evaluations = evaluations_of(str(FOLDER / "evaluations.yaml"))
    assert {study.PRIMARY, study.IID, *study.CUES} <= evaluations.keys()


def test_the_document_has_the_numbers_of_the_rule(study: Any) -> None:
    text = study.DOCUMENT.read_text()
    assert text.count(study.BEGIN) == text.count(study.END) == 1
    for number in (
        f"{STUDY.starts} starts",
        f"{STUDY.seeds} seeds",
        f"{STUDY.questions} questions",
        f"{STUDY.scenes} rooms",
        f"{100 * STUDY.active:g} % of the training samples",
        f"p < {STUDY.p:g}",
        f"at least {100 * STUDY.effect:g} points",
        f"at most {100 * STUDY.iid_loss:g} points",
        f"within {100 * STUDY.tie:g} point",
    ):
        assert number in text, number
