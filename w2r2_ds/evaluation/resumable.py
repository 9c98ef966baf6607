"""Answers saved while they are generated: one file per rank, so that a killed evaluation can be resumed.

OUT/parts-TASK-GEOMETRY/run.json       everything that the answers depend on; another run's answers raise an error
                        part-0003.jsonl  records of rank 3, appended batch by batch

Rank r of n answers those of samples r, r + n, r + 2n, ... that are in no file. The files may come from a run with
another number of ranks. A killed process may leave an incomplete last line: that sample is answered again. Merging
takes each sample once, in the order of the data set, so the result depends neither on the number of ranks nor on their
speed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO, overload

from w2r2_ds.evaluation.protocols.records import AnswerRecord, raise_with_first
from w2r2_ds.types.sample import Sample
from w2r2_ds.utils import atomic_io
from w2r2_ds.utils.json_io import read_json, read_jsonl
from w2r2_ds.utils.sanitize import CONTROL

RUN = "run.json"


class Selection(Sequence[Sample]):
    """A view of some samples of a data set; each is read when it is indexed."""

    def __init__(self, samples: Sequence[Sample], indices: Sequence[int]) -> None:
        self.samples, self.indices = samples, indices

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Selection: ...
    def __getitem__(self, index: int | slice) -> Sample | Selection:
        if isinstance(index, slice):
            return Selection(self.samples, self.indices[index])
        return self.samples[self.indices[index]]


class PartialAnswers:
    """The answers of an unfinished evaluation.

    Args:
        folder: folder of the files; created if it is missing.
        run: plain JSON, everything that the answers depend on.

    Raises:
        ValueError: the folder has answers of another run; names the first field that differs.
    """

    def __init__(self, folder: Path, run: Mapping[str, Any]) -> None:
        self.folder = folder
        wanted = json.loads(json.dumps(run))
        file = folder / RUN
        folder.mkdir(parents=True, exist_ok=True)
        if not file.is_file():
            # Ranks start at different times: another rank may have written run.json and its first answers after the
            # check above. Answers without run.json therefore need a second check before they are an error.
            if any(folder.glob("part-*.jsonl")) and not file.is_file():
                raise ValueError(f"{folder} has answers of an unknown run ({RUN} is missing); remove it.")
            atomic_io.replace(file, json.dumps(wanted, indent=2) + "\n")  # every rank writes the same content
        found = read_json(file)
        for field in dict.fromkeys([*wanted, *found]):
            if found.get(field) != wanted.get(field):
                raise ValueError(
                    f"{file}: {field} is {found.get(field)!r}, but now it is {wanted.get(field)!r}, so these answers "
                    f"belong to another evaluation; pass another --out, or remove {folder}."
                )

    def read(self) -> dict[str, AnswerRecord]:
        """All complete records by sample id; of two records of one sample, the first.

        Raises:
            ValueError: a line that is not the last one is not a record.
        """
        records: dict[str, AnswerRecord] = {}
        for file in sorted(self.folder.glob("part-*.jsonl")):
            # Only the last line can be incomplete: `writer` truncates it before it appends.
            try:
                for number, record in read_jsonl(file, allow_torn_end=True):
                    if "id" not in record:
                        raise ValueError(f"{file}: line {number} has no field 'id'.")
                    records.setdefault(record["id"], record)
            except ValueError as error:
                raise ValueError(f"{error} Remove the file; its samples are answered again.") from None
        return records

    @contextmanager
    def writer(self, rank: int) -> Iterator[TextIO]:
        """This rank's file, open for appending; an incomplete last line is removed first."""
        file = self.folder / f"part-{rank:04d}.jsonl"
        if file.is_file():
            content = file.read_bytes()
            os.truncate(file, content.rfind(b"\n") + 1)
        with open(file, "a", encoding="utf-8") as opened:
            yield opened

    def merge(self, ids: Sequence[str]) -> list[AnswerRecord]:
        """The records of these samples, in this order.

        Raises:
            ValueError: a sample has no record.
        """
        records = self.read()
        missing = [identity for identity in ids if identity not in records]
        raise_with_first(missing, f"of {len(ids)} answers are missing in {self.folder}", "; run the same command again")
        return [records[identity] for identity in ids]

    def remove(self) -> None:
        """Delete the folder, once the merged predictions file is written."""
        shutil.rmtree(self.folder)


def unanswered(ids: Sequence[str], done: Mapping[str, Any], rank: int, world_size: int) -> list[int]:
    """Indices of the samples that a rank still has to answer.

    The assignment of samples to ranks must not depend on `done`: a rank that starts later finds more answers, and ranks
    that divided only the remaining samples would skip some of them.
    """
    return [index for index in range(rank, len(ids), world_size) if ids[index] not in done]


def record_line(record: AnswerRecord) -> str:
    """A record as one line of JSON; control characters are escaped, so that a terminal does not execute them."""
    text = json.dumps(record, ensure_ascii=False, allow_nan=False)
    return CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text) + "\n"


def write_records(file: Path, records: Sequence[AnswerRecord]) -> None:
    """Write a predictions file atomically."""
    with atomic_io.replacing(file) as temporary, open(temporary, "w", encoding="utf-8") as opened:
        opened.writelines(record_line(record) for record in records)
