"""Answers on disk while they are made: one part file per rank, from which a killed evaluation goes on.

OUT/parts-TASK-GEOMETRY/run.json       settings that determine the answers; parts of other settings are rejected
                        part-0003.jsonl  records of rank 3, appended batch by batch

Rank r of n answers samples r, r + n, r + 2n, ... of those that no part has; any number of ranks may have written them.
A process that is killed may leave half a line at the end of its part: that sample is answered again. Merging takes each
sample once, in the order of the data set, so the result depends neither on the number of ranks nor on who was faster.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO, overload

from w2r2_ds.types.sample import Sample
from w2r2_ds.utils import atomic_io
from w2r2_ds.utils.sanitize import CONTROL

RUN = "run.json"
Record = dict[str, Any]


class Selection(Sequence[Sample]):
    """Some samples of a data set, made when asked for."""

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


class Parts:
    """The part files of one evaluation.

    Args:
        folder: where they lie; made where it is missing.
        run: plain JSON, all that the answers depend on.

    Raises:
        ValueError: the folder holds parts of another run; names the first field that differs.
    """

    def __init__(self, folder: Path, run: Mapping[str, Any]) -> None:
        self.folder = folder
        wanted = json.loads(json.dumps(run))
        file = folder / RUN
        folder.mkdir(parents=True, exist_ok=True)
        if not file.is_file():
            # Another rank may be just ahead: its parts come after the file.
            if any(folder.glob("part-*.jsonl")) and not file.is_file():
                raise ValueError(f"{folder} holds answers of an unknown run ({RUN} is missing); remove it.")
            atomic_io.replace(file, json.dumps(wanted, indent=2) + "\n")  # every rank writes the same
        found = json.loads(file.read_text())
        for field in dict.fromkeys([*wanted, *found]):
            if found.get(field) != wanted.get(field):
                raise ValueError(
                    f"{file}: {field} is {found.get(field)!r}, but now it is {wanted.get(field)!r}, so the answers "
                    f"there belong to another evaluation; name another --out, or remove {folder}."
                )

    def read(self) -> dict[str, Record]:
        """All whole records, by sample id; the first of equals.

        Raises:
            ValueError: a line that is not the last one is broken.
        """
        records: dict[str, Record] = {}
        for file in sorted(self.folder.glob("part-*.jsonl")):
            for record in _records(file):
                records.setdefault(record["id"], record)
        return records

    @contextmanager
    def writer(self, rank: int) -> Iterator[TextIO]:
        """This rank's part, to append lines to; half a line at its end is cut off first."""
        file = self.folder / f"part-{rank:04d}.jsonl"
        if file.is_file():
            content = file.read_bytes()
            os.truncate(file, content.rfind(b"\n") + 1)
        with open(file, "a", encoding="utf-8") as opened:
            yield opened

    def merge(self, ids: Sequence[str]) -> list[Record]:
        """The records of these samples, in this order.

        Raises:
            ValueError: some have none.
        """
        records = self.read()
        missing = [identity for identity in ids if identity not in records]
        if missing:
            raise ValueError(
                f"{self.folder} lacks {len(missing)} of {len(ids)} answers, the first is of {missing[0]!r}; "
                "run the same command again."
            )
        return [records[identity] for identity in ids]

    def remove(self) -> None:
        """When the merged answers are in place."""
        shutil.rmtree(self.folder)


def share(ids: Sequence[str], done: Mapping[str, Any], rank: int, world: int) -> list[int]:
    """Indices of the samples that are left to a rank.

    Which rank a sample belongs to does not depend on `done`: ranks that start later see more of it.
    """
    return [index for index in range(rank, len(ids), world) if ids[index] not in done]


def line_of(record: Record) -> str:
    """A record as it stands in files; what a terminal would take for a command stands there as JSON's escape."""
    text = json.dumps(record, ensure_ascii=False, allow_nan=False)
    return CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text) + "\n"


def write_records(file: Path, records: Sequence[Record]) -> None:
    """A predictions file is whole or not there."""
    with atomic_io.replacing(file) as temporary, open(temporary, "w", encoding="utf-8") as opened:
        opened.writelines(line_of(record) for record in records)


def _records(file: Path) -> Iterator[Record]:
    *lines, _ = file.read_bytes().split(b"\n")  # what follows the last line break was never finished
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            record["id"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{file}: line {number} is no record ({error!r}); remove the file, its samples are answered again."
            ) from None
        yield record
