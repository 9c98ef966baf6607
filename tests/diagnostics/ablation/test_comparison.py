"""Scores per sample of finished runs, and the comparison of the arms."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ablation_runs import PROTOCOL, differences, finish, make_plan, scene_of, write_checkpoint, write_scores
from w2r2_ds.diagnostics.ablation.comparison import compare
from w2r2_ds.diagnostics.ablation.output import print_results, write_plots, write_results
from w2r2_ds.diagnostics.ablation.plan import Plan, evaluation_folder
from w2r2_ds.diagnostics.ablation.results import read_results
from w2r2_ds.diagnostics.ablation.statistics import SCENES, SEEDS, holm, over_seeds, over_seeds_and_scenes, untested
from w2r2_ds.evaluation.protocols.registry import PROTOCOLS, ItemTerms, find_protocol
from w2r2_ds.training.checkpoint.manifest import TENSORS, read_manifest, write_manifest
from w2r2_ds.utils.files.atomic_io import digest

METRIC = f"fused {PROTOCOL} acc@0.25"
BASE, BETTER = "lambda_det=0", "lambda_det=1"
HITS = {
    BASE: [[True, False, False, False, True, False], [False, False, True, False, False, False]],
    BETTER: [[True, True, True, False, True, True], [True, True, True, True, False, True]],
}
IN_SCENES = [scene_of(index) for index in range(6)]


class Links(HTMLParser):
    """Collects the attributes by which a page loads other files; the text of scripts is not parsed."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attrs if name in ("src", "href")]


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """Two arms with two finished seeds of three, and an arm without runs."""
    plan = make_plan(tmp_path, [{"objective.lambda_det": [0, 1, 2]}], [0, 1, 2])
    finish(plan, HITS)
    return plan


def test_scores_per_sample(plan: Plan) -> None:
    results = read_results(plan)
    assert {arm: list(seeds) for arm, seeds in results.items()} == {BASE: [0, 1], BETTER: [0, 1], "lambda_det=2": []}
    score = results[BETTER][1][METRIC]
    assert score.value == pytest.approx(5 / 6) and score.samples is not None
    np.testing.assert_array_equal(score.samples.values, HITS[BETTER][1])
    assert list(score.samples.scenes) == IN_SCENES


def test_metrics_are_selected_by_a_part_of_their_name(plan: Plan) -> None:
    scores = read_results(plan, ("acc@0.25",))[BASE][0]
    assert list(scores) == [METRIC]
    with pytest.raises(ValueError, match=r"acc@0\.5"):
        read_results(plan, ("CIDEr",))


def test_a_metric_that_is_no_mean_has_no_scores_per_sample(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a protocol without scores per sample: the seeds are compared."""
    protocol = find_protocol(PROTOCOL)
    monkeypatch.setitem(PROTOCOLS, PROTOCOL, replace(protocol, item_terms=None))
    assert read_results(plan)[BASE][0][METRIC].samples is None
    row = next(row for row in compare(read_results(plan), BASE) if (row.arm, row.metric) == (BETTER, METRIC))
    assert row.difference is not None and row.difference.method == SEEDS


def test_a_ratio_is_no_mean(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """As F1 of detections, whose denominator is the number of boxes."""
    protocol = find_protocol(PROTOCOL)
    terms = protocol.item_terms
    assert terms is not None

    def ratios(result: dict[str, Any]) -> list[ItemTerms]:
        return [
            replace(each, sums={name: (2 * n, 2 * d) for name, (n, d) in each.sums.items()}) for each in terms(result)
        ]

    monkeypatch.setitem(PROTOCOLS, PROTOCOL, replace(protocol, item_terms=ratios))
    assert read_results(plan)[BASE][0][METRIC].samples is None


def test_scores_of_other_answers_are_an_error(plan: Plan) -> None:
    file = plan.runs[0].folder / "evaluation" / "fused" / "scores-scanrefer-fused.json"
    scores = json.loads(file.read_text())
    scores["protocols"][PROTOCOL]["overall"]["acc@0.25"] += 0.01
    file.write_text(json.dumps(scores))
    with pytest.raises(ValueError, match=str(file)):
        read_results(plan)


def test_runs_on_data_that_were_prepared_again_are_not_compared(plan: Plan) -> None:
    last = make_plan(plan.out, [{"objective.lambda_det": [0, 1, 2]}], [0, 1, 2]).runs[2]
    write_checkpoint(last.folder, data="prepared again")
    with pytest.raises(ValueError, match=rf"{last.folder}.*checkpoints.*{plan.runs[0].folder}"):
        read_results(plan)
    shutil.rmtree(last.folder)
    write_checkpoint(last.folder)
    write_scores(evaluation_folder(last, "fused"), HITS[BASE][0], data="prepared again")
    with pytest.raises(ValueError, match=rf"{last.folder}.*scores.*{plan.runs[0].folder}.*fused"):
        read_results(plan)


def test_files_of_an_older_version_are_named(plan: Plan) -> None:
    """Scores without the hashes of their sets, and a checkpoint without those of its training sets."""
    folder = plan.runs[0].folder
    file = folder / "evaluation" / "fused" / "scores-scanrefer-fused.json"
    scores = file.read_text()
    file.write_text(json.dumps({**json.loads(scores), "data": [{"path": "prepared/val"}]}))
    with pytest.raises(ValueError, match=rf"^{file} .*manifest.*remove {file.parent}"):
        read_results(plan)
    file.write_text(scores)
    (checkpoint,) = (folder / "checkpoints").glob("step-*")
    manifest = read_manifest(checkpoint)
    write_manifest(checkpoint, {"step": manifest["step"], "model": {}}, {TENSORS: digest(checkpoint / TENSORS)})
    with pytest.raises(ValueError, match=rf"^{checkpoint / 'checkpoint.json'} .*data.*remove {folder}"):
        read_results(plan)


def test_arms_may_have_training_sets_of_their_own(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, [{"data.train": [[{"path": "a"}], [{"path": "b"}]]}])
    for run in plan.runs:
        write_checkpoint(run.folder, data=run.arm.name)
        write_scores(evaluation_folder(run, "fused"), HITS[BASE][0])
    assert [list(seeds) for seeds in read_results(plan).values()] == [[0], [0]]


def test_runs_from_replaced_weights_are_not_compared(plan: Plan) -> None:
    last = make_plan(plan.out, [{"objective.lambda_det": [0, 1, 2]}], [0, 1, 2]).runs[2]
    write_checkpoint(last.folder, vlm="trained again")
    with pytest.raises(ValueError, match=rf"{last.folder}.*{plan.runs[0].folder}.*vlm_weights"):
        read_results(plan)


def test_arms_may_have_models_of_their_own(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, [{"model.vlm": ["a", "b"], "objective.mu": [0.1, 0.2]}])
    for run in plan.runs:
        write_checkpoint(run.folder, vlm=run.arm.options["model.vlm"])
        write_scores(evaluation_folder(run, "fused"), HITS[BASE][0])
    assert [list(seeds) for seeds in read_results(plan).values()] == [[0]] * 4


def test_arms_are_compared_with_the_baseline(plan: Plan) -> None:
    rows = compare(read_results(plan), BASE)
    base, better = (next(row for row in rows if (row.arm, row.metric) == (arm, METRIC)) for arm in (BASE, BETTER))
    assert base.difference is None and base.p_holm is None
    assert better.by_seed == pytest.approx({0: 5 / 6, 1: 5 / 6}) and base.by_seed == pytest.approx({0: 1 / 3, 1: 1 / 6})
    assert base.mean == pytest.approx(1 / 4) and base.deviation == pytest.approx(np.std([1 / 3, 1 / 6], ddof=1))
    assert better.difference == over_seeds_and_scenes(differences(HITS[BETTER], HITS[BASE]), IN_SCENES)
    expected = over_seeds([1 / 2, 2 / 3])
    assert better.difference is not None and better.over_seeds is not None and expected is not None
    assert better.over_seeds.low == pytest.approx(expected.low)


def test_p_is_corrected_for_all_metrics_and_arms(plan: Plan) -> None:
    """An arm with one seed is compared, but not tested, and does not count for the correction."""
    finish(make_plan(plan.out, [{"objective.lambda_det": [3]}], [0, 1]), {"lambda_det=3": HITS[BASE][::-1]})
    wider = make_plan(plan.out, [{"objective.lambda_det": [0, 1, 2, 3]}], [0, 1, 2])
    finish(wider, {"lambda_det=2": [HITS[BASE][0]]})
    compared = [row for row in compare(read_results(wider), BASE) if row.difference is not None]
    tested = [row for row in compared if row.difference is not None and row.difference.p is not None]
    assert {row.arm for row in tested} == {BETTER, "lambda_det=3"} and len(tested) >= 4
    assert [row.p_holm for row in tested] == holm([row.difference.p for row in tested if row.difference])  # type: ignore[misc]
    single = next(row for row in compared if row.arm == "lambda_det=2" and row.metric == METRIC)
    assert single.difference == untested(np.zeros((1, 6)), IN_SCENES) and single.difference.method == SCENES
    assert single.over_seeds is None and single.p_holm is None


def test_runs_on_different_samples_are_not_compared(plan: Plan) -> None:
    finish(make_plan(plan.out, [{"objective.lambda_det": [2]}]), {"lambda_det=2": [[True, True]]})
    with pytest.raises(ValueError, match="different samples"):
        compare(read_results(plan), BASE)


def test_files_and_table(plan: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    rows = compare(read_results(plan), BASE)
    content = json.loads(write_results(plan, rows, ["a failure"], 0.95).read_text())
    assert content["baseline"] == BASE and content["failures"] == ["a failure"]
    assert content["unfinished"] == [run.name for run in plan.runs if not plan.is_finished(run)]
    assert content["comparisons"] == sum(row.p_holm is not None for row in rows) > 0
    arms = {arm["name"]: arm for arm in content["arms"]}
    assert arms[BETTER]["options"] == {"objective.lambda_det": 1} and arms["lambda_det=2"]["metrics"] == {}
    metric = arms[BETTER]["metrics"][METRIC]
    assert metric["by_seed"] == pytest.approx({"0": 5 / 6, "1": 5 / 6}) and metric["difference"]["scenes"] == 5
    print_results(rows, BASE, 0.95)
    printed = capsys.readouterr().out
    assert "83.3 ± 0.0" in printed and "+58.3 [" in printed and "25.0 ± 11.8" in printed


def test_plots_are_one_file_without_markup_from_names(plan: Plan) -> None:
    pytest.importorskip("plotly", reason="plotly is not installed")
    hostile = make_plan(plan.out, [{"model.vlm": ["<script>alert(1)</script>", "b"]}])
    finish(hostile, {arm.name: [[True, False]] for arm in hostile.arms})
    file = write_plots(hostile, compare(read_results(hostile), hostile.baseline), 0.95)
    assert file is not None
    text = file.read_text()
    assert "<script>alert" not in text and "alert(1)" in text and len(text) < 8e6
    links = Links()
    links.feed(text)
    assert links.found == []
