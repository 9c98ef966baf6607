"""Table 1 on answers whose scores are known: a model that ignores geometry, one that needs it, draws, groups."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from hand_records import beside, camera_answer, caption, detection, grounding
from w2r2_ds.diagnostics.table1 import NOT_A_RATIO, Row, make_table
from w2r2_ds.evaluation.metrics.meteor import Java
from w2r2_ds.evaluation.predictions.record import record_of
from w2r2_ds.types.sample import Sample

DIRECT = "scanrefer/vgllm-direct"


def rooms(scenes: int = 8, per_scene: int = 3) -> list[Sample]:
    """Samples of several rooms; the last of every room is in the group `multiple`."""
    found = []
    for scene in range(scenes):
        for number in range(per_scene):
            sample = grounding(str(number), number, f"scene{scene:04d}_00")
            if number == per_scene - 1:
                sample = replace(sample, target=replace(sample.target, group="multiple"))  # type: ignore[type-var]
            found.append(sample)
    return found


def row(name: str, samples: list[Sample], answer: Callable[[int, Sample], str], draws: int = 1) -> Row:
    """A row whose answers are those of a function of (index of draw and sample, sample)."""
    records = [
        [record_of(sample, answer(draw * len(samples) + index, sample)) for index, sample in enumerate(samples)]
        for draw in range(draws)
    ]
    return Row(name, name, records)


def cell(table: dict[str, Any], row_name: str, metric: str = "acc@0.25", group: str = "overall") -> dict[str, Any]:
    (found,) = [
        each for each in table["cells"] if (each["row"], each["metric"], each["group"]) == (row_name, metric, group)
    ]
    return found


def difference(table: dict[str, Any], first: str, second: str, metric: str = "acc@0.25") -> dict[str, Any]:
    (found,) = [
        each
        for each in table["differences"]
        if (each["row"], each["minus"], each["metric"], each["group"]) == (first, second, metric, "overall")
    ]
    return found


def right(_: int, sample: Sample) -> str:
    return camera_answer(sample)


def wrong(_: int, sample: Sample) -> str:
    return camera_answer(sample, box=beside(3))


def test_a_model_that_ignores_geometry_has_equal_rows() -> None:
    samples = rooms()

    def answer(index: int, sample: Sample) -> str:  # right in every second sample, with any geometry
        return right(index, sample) if index % 2 else wrong(index, sample)

    table = make_table([row(name, samples, answer) for name in ("fused", "zero", "shuffle")], [DIRECT])
    cells = [cell(table, name) for name in ("fused", "zero", "shuffle")]
    assert all({**each, "row": ""} == {**cells[0], "row": ""} for each in cells)
    assert cells[0]["value"] == 0.5 and 0 < cells[0]["low"] < 0.5 < cells[0]["high"] < 1
    for pair in (("fused", "zero"), ("fused", "shuffle"), ("zero", "shuffle")):
        found = difference(table, *pair)
        assert (found["value"], found["low"], found["high"]) == (0, 0, 0)


def test_a_model_that_needs_geometry_is_right_with_its_own_only() -> None:
    samples = rooms()
    table = make_table([row("fused", samples, right), row("zero", samples, wrong)], [DIRECT])
    assert (cell(table, "fused")["value"], cell(table, "zero")["value"]) == (1, 0)
    found = difference(table, "fused", "zero", "acc@0.5")
    assert (found["value"], found["low"], found["high"]) == (1, 1, 1)
    assert [each["parsed"] for each in table["rows"]] == [{DIRECT: 1.0}] * 2
    assert json.loads(json.dumps(table, allow_nan=False)) == table


def test_groups_have_their_own_samples_and_scenes() -> None:
    samples = rooms(6, 3)

    def answer(index: int, sample: Sample) -> str:
        assert sample.target is not None
        return right(index, sample) if sample.target.group == "multiple" else wrong(index, sample)

    table = make_table([row("fused", samples, answer)], [DIRECT])
    counts = {group: cell(table, "fused", group=group) for group in ("overall", "unique", "multiple")}
    assert {group: (each["value"], each["samples"], each["scenes"]) for group, each in counts.items()} == {
        "overall": (pytest.approx(1 / 3), 18, 6),
        "unique": (0, 12, 6),
        "multiple": (1, 6, 6),
    }
    assert {each["group"] for each in table["cells"]} == set(counts)


def test_draws_are_averaged() -> None:
    """One of four draws is right everywhere."""
    samples = rooms()
    guess = row("random", samples, lambda index, s: right(0, s) if index < len(samples) else wrong(0, s), draws=4)
    table = make_table([row("fused", samples, right), guess], [DIRECT])
    assert cell(table, "random")["value"] == 0.25
    assert difference(table, "fused", "random")["value"] == 0.75
    assert [each["draws"] for each in table["rows"]] == [1, 4]


def test_few_scenes_have_scores_without_intervals() -> None:
    table = make_table([row("fused", rooms(2), right)], [DIRECT])
    found = cell(table, "fused")
    assert (found["value"], found["low"], found["high"], found["scenes"]) == (1, None, None, 2) and found["reason"]


def test_scores_of_a_corpus_have_no_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    """BLEU has a value and the reason; METEOR without Java has neither value nor interval; CIDEr has both."""
    monkeypatch.setattr("w2r2_ds.evaluation.metrics.meteor.shared_java", lambda: Java(program="no-such-java"))
    samples = [caption(number, scene=f"scene{number:04d}_00") for number in range(6)]
    texts = ["A table.", *(each.references[number % 2].text for number, each in enumerate(samples[1:], start=1))]
    table = make_table([row("fused", samples, lambda index, _: texts[index])], ["scan2cap/vgllm"])
    bleu, meteor, cider = (cell(table, "fused", f"{name}@0.5") for name in ("BLEU-4", "METEOR", "CIDEr"))
    assert bleu["value"] > 0.5 and (bleu["low"], bleu["reason"]) == (None, NOT_A_RATIO)
    assert meteor["value"] is None and meteor["reason"] not in ("", NOT_A_RATIO)
    assert cider["low"] < cider["value"] < cider["high"]


def test_detection_is_a_ratio_of_counts() -> None:
    """Half of the objects are found in every room, and nothing else: F1 = 2 / 3."""
    samples = [replace(detection(), id=f"s{number}", scene_id=f"scene{number:04d}_00") for number in range(6)]
    found = json.dumps([{"label": "chair", "bbox_3d": samples[0].objects[0].box.tolist()}])
    table = make_table(
        [row("fused", samples, lambda *_: found), row("zero", samples, lambda *_: "[]")], ["detection/f1"]
    )
    assert cell(table, "fused", "F1@0.25")["value"] == pytest.approx(2 / 3)
    assert difference(table, "fused", "zero", "F1@0.5")["value"] == pytest.approx(2 / 3)


def test_rows_of_other_samples_raise() -> None:
    samples = rooms(2)
    with pytest.raises(ValueError, match=r"'other'.*'fused'.*scene0001_00\|2"):
        make_table([row("fused", samples, right), row("other", samples[:-1], right)], [DIRECT])
    with pytest.raises(ValueError, match=r"'other'.*'fused'"):
        make_table([row("fused", samples, right), row("other", samples[::-1], right)], [DIRECT])
