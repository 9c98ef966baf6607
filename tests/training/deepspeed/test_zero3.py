"""The training step under ZeRO-3 on two processes: gradients of the unsharded model, a constant trace, no hangs.

All cases run in one launch (tests/helpers/ranks/zero3_cases.py), each with a time limit.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import zero3_cases
from anchor_batches import write_intrinsic
from runs import ZERO3, run_ranks
from two_scenes import two_scenes
from w2r2_ds.models.fusion import FUSIONS
from w2r2_ds.objective.push_terms import PUSH_TERMS
from zero3_cases import Case, write_cases

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(1800)]

GRADIENT_TOLERANCE = 1e-6
"""Tolerance relative to each tensor's norm in float32: two ranks sum in another order than one."""
SIMILAR = {"four": 0.2, "three": 0.9, "twelve": 0.75, "words": 0.95, "more words": 0.1, "other four": 0.5}
SPLIT = [[["four", "three"]], [["twelve", "three"]]]
TWO_SCENES = [[["four", "other four"]], [["twelve", "three"]]]
"""Samples for the push term `contrast`: a pair on one rank, none on the other."""
FACTORS: dict[str, Sequence[Any]] = {
    "push": list(PUSH_TERMS),
    "checkpointing": [False, True],
    "zero_geometry": ["merged", "features"],
    "visual": ["images", "video"],
    "fusion": list(FUSIONS),
}


def pairwise(factors: dict[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Rows in which each pair of values of two factors occurs (pairwise testing); a greedy, small set."""
    names = list(factors)
    every = [dict(zip(names, values, strict=True)) for values in itertools.product(*factors.values())]

    def pairs(row: dict[str, Any]) -> set[Any]:
        return {((a, row[a]), (b, row[b])) for a, b in itertools.combinations(names, 2)}

    missing = set().union(*map(pairs, every))
    rows = []
    while missing:
        best = max(every, key=lambda row: len(pairs(row) & missing))
        rows.append(best)
        missing -= pairs(best)
    return rows


def matrix_case(row: dict[str, Any]) -> Case:
    name = "-".join(str(value) for value in row.values())
    objective = {"push": row["push"], "margin": 30.0, "mu": 0.001 if row["push"] == "unblocked" else 0.7}
    model = {"zero_geometry": row["zero_geometry"], "fusion": row["fusion"]}
    split = TWO_SCENES if row["push"] == "contrast" else SPLIT
    return Case(name, split, objective, model, row["checkpointing"], row["visual"])


def run_cases(folder: Path, cases: list[Case], model_config: Any, samples: dict[str, Any]) -> tuple[Any, str]:
    """Results of every rank, and the output of rank 0."""
    ds_config = json.loads(ZERO3.read_text())
    # Small enough that the tiny model is gathered layer by layer, as a large model would be.
    ds_config["zero_optimization"] |= {
        "stage3_param_persistence_threshold": 0,
        "stage3_max_live_parameters": 30_000,
        "stage3_max_reuse_distance": 30_000,
        "stage3_prefetch_bucket_size": 10_000,
        "log_trace_cache_warnings": True,
    }
    write_cases(folder, cases, model_config, samples, ds_config, SIMILAR)
    printed = run_ranks(2, Path(zero3_cases.__file__), folder)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)], printed


@pytest.fixture(scope="module")
def named_samples(samples: list[Any]) -> dict[str, Any]:
    """The grounding samples, with target boxes that contain a random model's expected boxes, and two without frames."""
    assert [sample.id for sample in samples] == ["four", "three", "twelve"]
    box = np.array([0.0, 0, 0, 24, 24, 24, 0, 0, 0])
    result = {s.id: replace(s, target=replace(s.target, box=box)) for s in samples}
    for name, answer in (("words", "It is brown."), ("more words", "two")):
        result[name] = replace(
            samples[0],
            id=name,
            frames=(),
            cam_to_world=np.zeros((0, 4, 4)),
            question="How many chairs are there, and what colour are they?",
            answer=answer,
            target=None,
            kind="answer",
            what=(0, 0),
        )
    first, _, last = two_scenes([result[sample.id] for sample in samples])
    return result | {"other four": replace(last, id="other four", answer=first.answer)}


ROBUST = [
    Case(
        "text beside visual",
        [[["words", "more words"]], [["four", "three"]]],
        {"margin": 30.0},
        pass_order="sequential",
    ),
    Case(
        "visual beside text, features zeroed",
        [[["four", "three"]], [["words", "more words"]]],
        {"margin": 30.0},
        {"zero_geometry": "features"},
    ),
    Case("text everywhere", [[["words"]], [["more words"]]], {"push": "poe"}),
    Case("mixed in a batch", [[["words", "twelve"]], [["three", "more words"]]], {"push": "pseudo_label"}),
    Case("unequal frames and steps", [[["twelve"], ["words"]], [["three"], ["four"]]], {"margin": 30.0}, {}, True),
    Case("text beside video", [[["words"]], [["four"]]], {"push": "representation"}, {}, True, "video"),
    Case("text beside cross-attention", [[["words"]], [["twelve"]]], {}, {"fusion": "cross_attention"}),
    Case("text beside contrast", [[["words", "more words"]], [["four", "other four"]]], {"push": "contrast"}),
    Case("text, graph of the shortcut kept", [[["words"]], [["four"]]], {"push": "unblocked", "mu": 0.001}),
]
TRACED = [
    Case(
        f"traced {push} {pass_order} {checkpointing}",
        split,
        {"push": push, "margin": 30.0},
        {},
        checkpointing,
        steps=4,
        pass_order=pass_order,
    )
    for push, pass_order, split in (
        ("margin", "lockstep", SPLIT),
        ("representation", "sequential", SPLIT),
        ("contrast", "lockstep", TWO_SCENES),
    )
    for checkpointing in (False, True)
]
GREEDY = [
    Case("greedy", [[["four", "words"]], [["three", "more words"]]], {"shortcut_decode": "greedy", "margin": 30.0}),
    Case("decode_gap", [[["four"]], [["three"]]], {"decode_gap_every": 1, "decode_gap_samples": 3}, steps=1),
]
ANCHORS = [
    Case(
        f"anchors beside text, {push} {pass_order}",
        [[["words"], ["twelve"]], [["four"], ["three", "more words"]]],
        {"shortcut_decode": "anchor", "push": push, "mu": 0.001},
        pass_order=pass_order,
    )
    # The layers of `unblocked` are no leaf modules: every projection gathers its own weights.
    for push, pass_order in (("margin", "lockstep"), ("margin", "sequential"), ("unblocked", "sequential"))
]
MATRIX = [matrix_case(row) for row in pairwise(FACTORS)]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, model_config: Any, named_samples: dict[str, Any]) -> Any:
    """All cases of this file in one launch."""
    folder = tmp_path_factory.mktemp("zero3")
    write_intrinsic(named_samples["four"])  # beside the frames of all samples
    return run_cases(folder, [*MATRIX, *ROBUST, *TRACED, *GREEDY, *ANCHORS], model_config, named_samples)


def test_the_matrix_is_pairwise() -> None:
    for (one, values), (other, more) in itertools.combinations(FACTORS.items(), 2):
        met = {(row[one], row[other]) for row in pairwise(FACTORS)}
        assert met == set(itertools.product(values, more))
    assert len(MATRIX) <= 48


@pytest.mark.parametrize("case", [*MATRIX, *ROBUST, *TRACED, *GREEDY, *ANCHORS], ids=lambda case: case.name)
def test_gradients_equal_those_of_the_unsharded_model(results: Any, case: Case) -> None:
    check_case(case, results[0])


def check_case(case: Case, ranks: Any) -> None:
    """Both ranks have the gradients of the single process, and the push terms are not zero."""
    for found in (rank[case.name] for rank in ranks):
        assert found["worst"] <= GRADIENT_TOLERANCE
        assert found["stats_worst"] <= 1e-5
        for name, value in found["expected_norms"].items():
            assert found["norms"][name] == pytest.approx(value, rel=1e-5)
        both = found["norms"]["grad_norm_lora"] ** 2 + found["norms"]["grad_norm_geometry"] ** 2
        assert found["norms"]["grad_norm"] ** 2 == pytest.approx(both, rel=1e-5)
    if "fusion" in case.model and "zero_geometry" in case.model:  # of the matrix
        assert any(ranks[0][case.name]["stats"]["push"]) == (case.objective["push"] != "none")


def test_text_only_batches_have_zero_geometry_gradients(results: Any) -> None:
    """Only if no rank has frames. A dummy image keeps the order of modules, without an effect on the loss."""
    for rank in results[0]:
        assert {name.split(".")[0] for name in rank["text everywhere"]["without_gradient"]} == {"geometry_merger"}
        assert rank["text beside visual"]["without_gradient"] == []
        assert rank["text beside visual"]["stats"]["geometry_norm"][:2] == [0.0, 0.0]
        assert min(rank["text beside visual"]["stats"]["geometry_norm"][2:]) > 0


@pytest.mark.parametrize("case", TRACED, ids=lambda case: case.name)
def test_the_trace_is_recorded_once(results: Any, case: Case) -> None:
    """After the first step DeepSpeed logs no invalidation of its parameter trace."""
    parts = re.split(r"== step (\d+) of ([^\n]*)\n", results[1])
    said = {(name, int(step)): text for step, name, text in zip(parts[1::3], parts[2::3], parts[3::3], strict=True)}
    later = [said[case.name, step] for step in range(1, case.steps)]
    assert len(later) == case.steps - 1
    assert not any("Invalidate trace" in text for text in later)


def test_an_invalid_trace_is_logged(results: Any) -> None:
    """Decoding invalidates the trace, which is logged: the test above can fail."""
    assert "Invalidate trace" in results[1]


def test_the_decode_gap_is_measured_and_equal_on_both_ranks(results: Any) -> None:
    one, other = (rank["decode_gap"]["decode_gap"] for rank in results[0])
    assert one == other and set(one) == {"gap_s_teacher", "gap_s_greedy", "gap_abs"}
    assert 0 <= one["gap_s_greedy"] <= 1 and one["gap_abs"] >= 0


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("fusion", list(FUSIONS))
def test_the_full_matrix(
    fusion: str, tmp_path: Path, model_config: Any, named_samples: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One launch per fusion, because a process keeps about 3 MB of every case."""
    monkeypatch.setattr("runs.TIMEOUT", 3500)
    factors = FACTORS | {"fusion": [fusion]}
    cases = [matrix_case(dict(zip(factors, values, strict=True))) for values in itertools.product(*factors.values())]
    ranks, _ = run_cases(tmp_path, cases, model_config, named_samples)
    for case in cases:
        check_case(case, ranks)
