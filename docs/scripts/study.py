"""Results of docs/research/study.md: ``python docs/scripts/study.py runs/study --root runs/study/rooms``.

Reads the ablations ``runs/study/START`` (`w2r2 ablate`) of all pretrained starts, applies the rule of the study
(`w2r2_ds/diagnostics/ablation/decision.py`), and prints the tables. ``--write`` also writes docs/measured/study.json
and the tables into the document. If the study is not complete, they begin with a note about it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from w2r2_ds.data.prepared_set import PreparedSet
from w2r2_ds.diagnostics.ablation.decision import STUDY, ArmRuns, Decision, Key, Rule, decide
from w2r2_ds.diagnostics.ablation.grid import Arm
from w2r2_ds.diagnostics.ablation.plan import Run, read_score_file
from w2r2_ds.diagnostics.ablation.results import (
    SampleScores,
    check_same_data,
    check_same_evaluation,
    check_same_models,
    check_same_training,
    predictions_file,
    read_scores,
)
from w2r2_ds.diagnostics.row_cues import cue_results, cues_of
from w2r2_ds.diagnostics.table1 import Row
from w2r2_ds.evaluation.datasets import describe_sets
from w2r2_ds.evaluation.protocols.records import answer_world_box
from w2r2_ds.objective.push_terms import PUSH_TERMS
from w2r2_ds.training.checkpoint.manifest import newest, weights_sha256
from w2r2_ds.training.metrics import METRICS_FILE, read_metrics
from w2r2_ds.types.sample import Sample
from w2r2_ds.utils.files.json_io import read_json_object, read_jsonl

DOCS = Path(__file__).parents[1]
DOCUMENT, JSON = DOCS / "research" / "study.md", DOCS / "measured" / "study.json"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
METRIC = "acc@0.25"
PRIMARY, IID = "camera", "iid"
"""Evaluations of the primary outcome, and on unshifted data."""
CUES = ("camera", "room_scale")
"""Evaluations whose share of answers with the cue is listed."""
BASELINE, CONTROL = {"objective.push_term": "none"}, "train.steps"
"""Options of the baseline, and the option by which the control differs from it."""
DEFAULT_MU = 0.1
"""`objective.mu` of the study's recipe."""
CLIP = 2.0
"""Metres: largest position error of an answer, and that of an answer without box."""
PUSH_TERM = "objective.push_term"
DIAGNOSIS = Path("diagnosis") / "diagnosis-scanrefer.json"
"""Diagnosis of a run, in its folder."""


@dataclass
class RunMeasures:
    """Measures of one run; missing ones are not in the dictionaries, or None."""

    scores: dict[str, SampleScores] = field(default_factory=dict)
    position: dict[str, float] = field(default_factory=dict)
    cue: dict[str, float] = field(default_factory=dict)
    slopes: dict[str, float] = field(default_factory=dict)
    active: float | None = None
    step_seconds: float | None = None


@dataclass
class StudyArm:
    """An arm of the study and its runs, by start and seed."""

    name: str
    options: Mapping[str, Any]
    runs: dict[Key, RunMeasures] = field(default_factory=dict)

    @property
    def is_push_term(self) -> bool:
        """Whether it differs from the baseline in its push term only; another `mu` belongs to the term."""
        return self.options.keys() <= {PUSH_TERM, "objective.mu"} and self.options != BASELINE

    @property
    def is_gated(self) -> bool:
        """Whether its push term is 0 where the hinge is 0."""
        term = self.options.get(PUSH_TERM, "none")
        return PUSH_TERMS.find(term if isinstance(term, str) else term["name"]).gated

    @property
    def mu(self) -> float:
        """Its threshold of the hinge."""
        return float(self.options.get("objective.mu", DEFAULT_MU))

    def mean(self, measure: str, key: str) -> float | None:
        """Mean over the runs that have the measure."""
        found = [getattr(run, measure)[key] for run in self.runs.values() if key in getattr(run, measure)]
        values = [each.values.mean() if isinstance(each, SampleScores) else each for each in found]
        return float(np.mean(values)) if values else None

    def average(self, attribute: str) -> float | None:
        """Mean of a number of the runs that have it."""
        values = [value for run in self.runs.values() if (value := getattr(run, attribute)) is not None]
        return float(np.mean(values)) if values else None


def read_study(folder: Path, root: Path) -> list[StudyArm]:
    """All arms with their finished runs.

    Args:
        folder: folder with the ablation of every start.
        root: data root of the prepared sets.

    Raises:
        ValueError: there is no ablation with results, or as `RunReader.read`.
    """
    starts = sorted(file.parent for file in folder.glob("*/results.json"))
    if not starts:
        raise ValueError(f"{folder} has no START/results.json; run docs/research/study/run.sh first.")
    arms: dict[str, StudyArm] = {}
    reader = RunReader(root)
    for start in starts:
        models: dict[str, tuple[Path, Any]] = {}  # every start has its own weights
        for entry in read_json_object(start / "results.json")["arms"]:
            arm = Arm(entry["name"], entry["options"])
            own = arms.setdefault(arm.name, StudyArm(arm.name, arm.options))
            for path in sorted((start / "runs" / arm.folder).glob("seed-*")):
                run = Run(arm, int(path.name.removeprefix("seed-")), path)
                measures = reader.read(run, models)
                if measures.scores:
                    own.runs[start.name, run.seed] = measures
    return list(arms.values())


@dataclass
class RunReader:
    """Reads the runs of all starts, which must have the same data.

    Attributes:
        root: data root of the prepared sets.
        first: use of data -> first file with it and its data.
        sets: folder of a prepared set -> the set and its samples.
    """

    root: Path
    first: dict[str, tuple[Path, Any]] = field(default_factory=dict)
    sets: dict[Path, tuple[PreparedSet, list[Sample]]] = field(default_factory=dict)

    def read(self, run: Run, models: dict[str, tuple[Path, Any]]) -> RunMeasures:
        """Measures of all finished evaluations of a run.

        Args:
            run: the run.
            models: as `first` of `check_same_models`, of the runs of one start.

        Raises:
            ValueError: it was trained or evaluated on other data than another run, or trained from other weights than
                another run of its start; a set was prepared again since the evaluation; answers are not to the
                questions of their set; or the diagnosis is of other weights.
        """
        result = RunMeasures()
        checkpoint = newest(run.folder)
        if checkpoint is None:
            return result
        check_same_training(self.first, run, checkpoint)
        check_same_models(models, run, checkpoint)
        for name in sorted(path.name for path in (run.folder / "evaluation").glob("*")):
            if (evaluated := read_score_file(run, name)) is not None:
                self._read_evaluation(result, name, *evaluated)
        steps = [values for _, values in read_metrics(run.folder / METRICS_FILE)]
        result.active = float(np.mean([values["above_mu"] for values in steps])) if steps else None
        result.step_seconds = float(np.median([values["step_s"] for values in steps])) if steps else None
        if (diagnosis := run.folder / DIAGNOSIS).is_file():
            result.slopes = self._read_slopes(diagnosis, weights_sha256(checkpoint))
        return result

    def _read_evaluation(self, result: RunMeasures, name: str, file: Path, content: Mapping[str, Any]) -> None:
        """Add the measures of one evaluation."""
        check_same_evaluation(self.first, name, file, content)
        for metric, score in read_scores(file, name, content["protocols"], (METRIC,), set()).items():
            assert score.samples is not None, f"{metric} is a mean over samples"
            result.scores[name] = score.samples
        predictions = predictions_file(file)
        records = [record for _, record in read_jsonl(predictions)]
        prepared, samples = self._samples(file, content["data"])
        if [record["id"] for record in records] != [sample.id for sample in samples[: len(records)]]:
            raise ValueError(f"{predictions} has other questions than the first of {prepared.folder}; evaluate again.")
        result.position[name] = position_error(records)
        if name in CUES:
            rows, chosen = [Row(name, name, [records])], samples[: len(records)]
            share = cue_results(rows, chosen, cues_of([prepared]), 100, 0)[name]["centre"]["cue"]["value"]
            if share is not None:
                result.cue[name] = share

    def _samples(self, file: Path, data: Sequence[Mapping[str, Any]]) -> tuple[PreparedSet, list[Sample]]:
        """The prepared set of a score file and its samples, if it is still that of the evaluation."""
        (described,) = data
        folder = Path(described["path"])
        if folder not in self.sets:
            prepared = PreparedSet(folder, self.root)
            self.sets[folder] = prepared, list(prepared)
        prepared, samples = self.sets[folder]
        if describe_sets([prepared])[0]["manifest"] != described["manifest"]:
            raise ValueError(f"{folder} was prepared again since {file} was written; remove the run, and repeat it.")
        return prepared, samples

    def _read_slopes(self, diagnosis: Path, weights: str) -> dict[str, float]:
        """`causality_slopes` of a diagnosis of a run with these weights."""
        content = read_json_object(diagnosis)
        digests = [each["manifest"] for each in content["data"]]
        check_same_data(self.first, "causality", diagnosis, digests)
        scores = diagnosis.with_name("scores-scanrefer-fused.json")
        if read_json_object(scores)["run"]["weights"] != weights:
            raise ValueError(f"{diagnosis} is of other weights than the run; remove the folder, and diagnose again.")
        return causality_slopes(content["causality"])


def position_error(records: Sequence[Mapping[str, Any]]) -> float:
    """Mean distance between the centres of answer and truth in metres, each at most `CLIP`."""
    errors = []
    for record in records:
        box = answer_world_box(record)
        true = record["target"]["box"][:3]
        errors.append(CLIP if box is None else min(CLIP, float(np.linalg.norm(np.subtract(box[:3], true)))))
    return float(np.mean(errors))


def causality_slopes(causality: Mapping[str, Any]) -> dict[str, float]:
    """Kind of intervention -> mean slope of the coordinates of the centre."""
    slopes = {}
    for kind, measures in causality["interventions"].items():
        numbers = [measures["numbers"][name] for name in ("x", "y", "z") if name in measures["numbers"]]
        values = [each["slope"]["value"] for each in numbers if each["rows"] and each["slope"]["value"] is not None]
        if values:
            slopes[kind] = float(np.mean(values))
    return slopes


def apply_rule(arms: Sequence[StudyArm], rule: Rule = STUDY) -> Decision:
    """The decision about the default push term.

    Raises:
        ValueError: there is no baseline or no control.
    """
    baseline = [arm for arm in arms if arm.options == BASELINE]
    control = [arm for arm in arms if arm.options.keys() == {*BASELINE, CONTROL}]
    if not baseline or not control:
        raise ValueError(f"the study needs an arm {BASELINE}, and one of it with another {CONTROL}.")
    scenes, ids = _questions([arm for arm in arms if arm.runs])
    others = [arm for arm in arms if arm is not baseline[0] and arm not in superseded(arms)]
    runs = [_arm_runs(arm, ids) for arm in (baseline[0], *others)]
    return decide(runs[0], runs[1:], scenes, control[0].name, rule)


def superseded(arms: Sequence[StudyArm]) -> list[StudyArm]:
    """Push terms that were run again with a lower `mu`, because their hinge was inactive."""
    lowest: dict[str, StudyArm] = {}
    terms = [arm for arm in arms if arm.is_push_term and arm.runs]
    for arm in sorted(terms, key=lambda each: each.mu):
        lowest.setdefault(json.dumps(arm.options[PUSH_TERM], sort_keys=True), arm)
    return [arm for arm in terms if arm not in lowest.values()]


def _questions(arms: Sequence[StudyArm]) -> tuple[list[str], dict[str, tuple[str, ...]]]:
    """Scenes of the primary outcome, and the ids of the questions of both outcomes, which all runs must have."""
    ids: dict[str, tuple[str, ...]] = {}
    scenes: list[str] = []
    for arm in arms:
        for (start, seed), run in arm.runs.items():
            for name in (PRIMARY, IID):
                if name in run.scores and ids.setdefault(name, run.scores[name].ids) != run.scores[name].ids:
                    raise ValueError(f"{start}/{arm.name} seed {seed}: {name} has other questions than other runs.")
            scenes = list(run.scores[PRIMARY].scenes) if PRIMARY in run.scores else scenes
    return scenes, ids


def _arm_runs(arm: StudyArm, ids: Mapping[str, tuple[str, ...]]) -> ArmRuns:
    """Input of the rule: the runs that have both outcomes."""
    complete = {key: run for key, run in arm.runs.items() if run.scores.keys() >= ids.keys() == {PRIMARY, IID}}
    return ArmRuns(
        arm.name,
        {key: run.scores[PRIMARY].values for key, run in complete.items()},
        {key: run.scores[IID].values for key, run in complete.items()},
        arm.average("step_seconds") or 0.0,
        arm.is_push_term,
        arm.average("active") if arm.is_gated else None,
        arm.mu,
    )


def as_json(arms: Sequence[StudyArm], decision: Decision, rule: Rule) -> dict[str, Any]:
    """Content of docs/measured/study.json."""
    return {
        "rule": asdict(rule),
        "decided": decision.decided,
        "default": decision.default,
        "reason": decision.reason,
        "arms": [
            {
                "name": arm.name,
                "options": dict(arm.options),
                "runs": sorted(f"{start}/{seed}" for start, seed in arm.runs),
                "acc@0.25": _all(arm, "scores"),
                "position_error": _all(arm, "position"),
                "cue": _all(arm, "cue"),
                "slope": _all(arm, "slopes"),
                "active": arm.average("active"),
                "step_seconds": arm.average("step_seconds"),
            }
            for arm in arms
        ],
        "comparisons": [asdict(result) for result in decision.results],
    }


def _all(arm: StudyArm, measure: str) -> dict[str, float | None]:
    """Means of a measure over the runs, by its keys."""
    keys = sorted({key for run in arm.runs.values() for key in getattr(run, measure)})
    return {key: arm.mean(measure, key) for key in keys}


def tables(arms: Sequence[StudyArm], decision: Decision) -> str:
    """Markdown: the decision, the comparison by the rule, and all measures."""
    complete = "" if decision.decided else "**The study is not complete; the rule decides nothing yet.** "
    outcome = f"New default: `{decision.default}`." if decision.default else "The default does not change."
    head = f"{complete}{outcome if decision.decided else ''} {decision.reason}.".strip()
    compared = ["arm", "state", "difference", "p (Holm)", "by start", "iid", "better"]
    rows = []
    for each in decision.results:
        difference, starts = each.difference, each.by_start or {}
        interval = ""
        if difference is not None and difference.low is not None and difference.high is not None:
            interval = f"{100 * difference.mean:+.1f} [{100 * difference.low:+.1f}, {100 * difference.high:+.1f}]"
        by_start = ", ".join(f"{start} {100 * value:+.1f}" for start, value in starts.items())
        p = "" if each.p_holm is None else f"{each.p_holm:.3f}"
        better = "yes" if each.better else each.reason
        rows.append([f"`{each.name}`", each.state, interval, p, by_start, _cell(each.iid, 100, "+.1f"), better])
    names = sorted({name for arm in arms for run in arm.runs.values() for name in run.scores})
    measured = [
        "arm",
        "runs",
        *names,
        "position (m)",
        *(f"cue, {name}" for name in CUES),
        "slope, scale",
        "slope, shift",
    ]
    cells = [
        [
            f"`{arm.name}`",
            str(len(arm.runs)),
            *(_cell(arm.mean("scores", name), 100, ".1f") for name in names),
            _cell(arm.mean("position", PRIMARY), 1, ".2f"),
            *(_cell(arm.mean("cue", name), 100, ".1f") for name in CUES),
            *(_cell(arm.mean("slopes", kind), 1, ".2f") for kind in ("scale", "shift")),
            _cell(arm.average("active"), 100, ".0f"),
            _cell(arm.average("step_seconds"), 1, ".2f"),
        ]
        for arm in arms
    ]
    return "\n\n".join([head, _table(compared, rows), _table([*measured, "hinge active (%)", "s/step"], cells)])


def _cell(value: float | None, factor: float, form: str) -> str:
    return "" if value is None else f"{factor * value:{form}}"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [columns, ["---"] * len(columns), *rows])


def write(text: str, content: Mapping[str, Any], document: Path = DOCUMENT, file: Path = JSON) -> None:
    """Replace the results of the document, and write the JSON."""
    old = document.read_text()
    before, rest = old.split(BEGIN)
    after = rest.split(END)[1]
    document.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")
    file.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")


def main(words: Sequence[str] | None = None) -> None:
    """Print the tables of a study, and write them if asked."""
    parser = argparse.ArgumentParser(description="Tables and decision of the study of push terms.")
    parser.add_argument("folder", type=Path, help="folder with the ablation of every start")
    parser.add_argument("--root", type=Path, required=True, help="data root of the prepared sets")
    parser.add_argument("--write", action="store_true", help="write the document and docs/measured/study.json")
    options = parser.parse_args(words)
    arms = read_study(options.folder, options.root)
    decision = apply_rule(arms)
    text = tables(arms, decision)
    print(text)
    if options.write:
        write(text, as_json(arms, decision, STUDY))


if __name__ == "__main__":
    main()
