"""Saved answers of an evaluation: assignment to ranks, incomplete lines, other runs, merging."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from w2r2_ds.evaluation.resumable import PartialAnswers, Selection, record_line, unanswered, write_records

IDS = [f"s{number}" for number in range(10)]
RUN: dict[str, Any] = {"weights": "a", "geometry": "fused", "data": ["m"]}


def answer(identity: str) -> dict[str, Any]:
    return {"id": identity, "text": f"ünï {identity}"}


def work(parts: PartialAnswers, rank: int, world: int, most: int = 100) -> list[str]:
    """Evaluate as a rank that is killed after `most` samples."""
    mine = unanswered(IDS, parts.read(), rank, world)[:most]
    with parts.writer(rank) as file:
        file.writelines(record_line(answer(IDS[index])) for index in mine)
    return [IDS[index] for index in mine]


def test_another_number_of_ranks_resumes(tmp_path: Path) -> None:
    parts = PartialAnswers(tmp_path / "parts", RUN)
    assert [work(parts, rank, 3, 2) for rank in range(3)] == [["s0", "s3"], ["s1", "s4"], ["s2", "s5"]]
    assert [work(parts, rank, 2, 1) for rank in (1, 0)] == [["s7"], ["s6"]]
    assert work(parts, 0, 1) == ["s8", "s9"]
    assert parts.merge(IDS) == [answer(identity) for identity in IDS]
    assert parts.merge(IDS[2:4]) == [answer("s2"), answer("s3")]


def test_shards_are_disjoint_if_ranks_list_different_parts() -> None:
    done = {"s1": 0, "s4": 0}
    both = unanswered(IDS, {}, 0, 2) + unanswered(IDS, done, 1, 2)
    assert sorted(both) == [0, 2, 3, 4, 5, 6, 7, 8, 9]


def test_an_incomplete_line_is_answered_again(tmp_path: Path) -> None:
    parts = PartialAnswers(tmp_path, RUN)
    work(parts, 0, 1, 3)
    file = tmp_path / "part-0000.jsonl"
    whole = file.read_bytes()
    for cut in (whole[:-1], whole[:-9], whole + b'{"id": "s3"'):
        file.write_bytes(cut)
        kept = len(cut.split(b"\n")) - 1
        assert list(parts.read()) == IDS[:kept]
        assert work(parts, 0, 1) == IDS[kept:]
        assert parts.merge(IDS) == [answer(identity) for identity in IDS]


def test_a_line_cut_at_any_byte_is_answered_again(tmp_path: Path) -> None:
    parts = PartialAnswers(tmp_path, RUN)
    file = tmp_path / "part-0000.jsonl"
    first, last = (record_line({"id": identity, "text": "café"}).encode() for identity in ("s0", "s1"))
    assert len(last) > len(last.decode()), "a cut may be inside a character"
    for cut in range(len(last)):
        file.write_bytes(first + last[:cut])
        assert list(parts.read()) == ["s0"]
        with parts.writer(0):
            assert file.read_bytes() == first


@pytest.mark.parametrize("line", [b'{"text": 1}', b'{"id": "s', b'{"id": "caf\xc3"}', b"[]"])
def test_an_invalid_line_raises_with_its_number(tmp_path: Path, line: bytes) -> None:
    parts = PartialAnswers(tmp_path, RUN)
    (tmp_path / "part-0002.jsonl").write_bytes(b'{"id": "s0"}\n' + line + b'\n{"id": "s1"}\n')
    with pytest.raises(ValueError, match=r"part-0002\.jsonl: line 2 .*Remove the file"):
        parts.read()


def test_duplicate_answers_count_once(tmp_path: Path) -> None:
    parts = PartialAnswers(tmp_path, RUN)
    for rank in (1, 0):
        with parts.writer(rank) as file:
            file.write(record_line({"id": "s0", "text": str(rank)}) * 2)
    assert parts.merge(["s0"]) == [{"id": "s0", "text": "0"}]


def test_missing_answers_are_counted(tmp_path: Path) -> None:
    parts = PartialAnswers(tmp_path, RUN)
    work(parts, 0, 2)
    with pytest.raises(ValueError, match=r"5 of 10 answers are missing in .*, the first is 's1'"):
        parts.merge(IDS)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"weights": "b"}, "weights is 'a', but now it is 'b'"),
        ({"data": ["m", "n"]}, "data is"),
        ({"new": 1}, "new is"),
    ],
)
def test_parts_of_another_run_are_rejected(tmp_path: Path, change: dict[str, Any], field: str) -> None:
    work(PartialAnswers(tmp_path, RUN), 0, 1, 1)
    PartialAnswers(tmp_path, dict(reversed(RUN.items())))
    with pytest.raises(ValueError, match=field):
        PartialAnswers(tmp_path, RUN | change)


def test_parts_of_an_unknown_run_are_rejected(tmp_path: Path) -> None:
    work(PartialAnswers(tmp_path, RUN), 0, 1, 1)
    (tmp_path / "run.json").unlink()
    with pytest.raises(ValueError, match=r"unknown run \(run.json is missing\); remove it"):
        PartialAnswers(tmp_path, RUN)


def test_a_predictions_file_is_written_atomically(tmp_path: Path) -> None:
    file = tmp_path / "predictions.jsonl"
    write_records(file, [answer("s0")])
    before = file.read_bytes()
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_records(file, [answer("s1"), {"id": "s2", "iou": float("nan")}])
    assert file.read_bytes() == before and json.loads(before) == answer("s0")


def test_selection_indexes_the_underlying_set() -> None:
    chosen: Any = Selection(IDS, [7, 1, 3])  # type: ignore[arg-type]
    assert (list(chosen), list(chosen[1:]), len(chosen)) == (["s7", "s1", "s3"], ["s1", "s3"], 3)
