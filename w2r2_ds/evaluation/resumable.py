"""Save answers while they are generated, in one file per rank, so that a killed evaluation can be resumed.

OUT/parts-TASK-GEOMETRY/run.json         all options and hashes that the answers depend on (the run's identity)
                        part-0003.jsonl  records of rank 3, appended batch by batch

Rank r of n answers those of samples r, r + n, r + 2n, ... that are in no file. The files may come from a run with
another number of ranks. A killed process may leave an incomplete last line; its sample is answered again. Merging takes
one record per sample, in the order of the data set, so the result depends neither on the number of ranks nor on their
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
from w2r2_ds.utils.files import atomic_io
from w2r2_ds.utils.files.hashing import file_sha256
from w2r2_ds.utils.files.json_io import read_json, read_json_object, read_jsonl
from w2r2_ds.utils.files.output_folder import make_folder
from w2r2_ds.utils.sanitize import CONTROL

RUN = "run.json"


class Selection(Sequence[Sample]):
    """A view of some samples of a data set; a sample is read when it is indexed.

    Args:
        samples: the data set.
        indices: indices of the selected samples, in the order of the view.
    """

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
    """The saved answers of an unfinished evaluation.

    Args:
        folder: folder of the files; created if it is missing.
        run: all options and hashes that the answers depend on, as JSON values.

    Raises:
        ValueError: the folder has answers of another run; the message names the first field that differs.
    """

    def __init__(self, folder: Path, run: Mapping[str, Any]) -> None:
        self.folder = folder
        wanted = json.loads(json.dumps(run))  # as it is read back: tuples are lists
        file = folder / RUN
        make_folder(folder)
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
        """Sample id -> record, of all complete lines of all ranks' files.

        Raises:
            ValueError: a line other than an incomplete last one is not a record.
        """
        records: dict[str, AnswerRecord] = {}
        # A sample has two records if ranks of a killed evaluation were still writing when the next one started. All
        # ranks use the first one, in the order of the files.
        for file in sorted(self.folder.glob("part-*.jsonl")):
            # Only the last line can be incomplete: `writer` removes an incomplete line before it appends.
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
        """Open this rank's file for appending; an incomplete last line is removed first."""
        file = self.folder / f"part-{rank:04d}.jsonl"
        if file.is_file():
            content = file.read_bytes()
            os.truncate(file, content.rfind(b"\n") + 1)  # the whole file if it has no complete line
        with open(file, "a", encoding="utf-8") as opened:
            yield opened

    def merge(self, ids: Sequence[str]) -> list[AnswerRecord]:
        """The records of the given samples, in their order.

        Raises:
            ValueError: a sample has no record.
        """
        records = self.read()
        missing = [sample_id for sample_id in ids if sample_id not in records]
        raise_with_first(missing, f"of {len(ids)} answers are missing in {self.folder}", "; run the same command again")
        return [records[sample_id] for sample_id in ids]

    def remove(self) -> None:
        """Delete the folder; called after the merged predictions file is written."""
        shutil.rmtree(self.folder)


def unanswered(ids: Sequence[str], done: Mapping[str, Any], rank: int, world_size: int) -> list[int]:
    """Indices of the samples that a rank has not answered yet.

    Args:
        ids: ids of all samples of the evaluation.
        done: sample id -> record of the saved answers.
        rank: this process.
        world_size: number of processes.
    """
    # The assignment of samples to ranks does not depend on `done`: ranks read it at different times, a later one finds
    # more answers, and ranks that divided the remaining samples by different lists would skip some of them.
    return [index for index in range(rank, len(ids), world_size) if ids[index] not in done]


def record_line(record: AnswerRecord) -> str:
    """A record as one line of JSON, with control characters escaped, so that a terminal does not interpret them."""
    text = json.dumps(record, ensure_ascii=False, allow_nan=False)
    return CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text) + "\n"


def write_records(file: Path, records: Sequence[AnswerRecord]) -> None:
    """Write a predictions file atomically."""
    with atomic_io.replacing(file) as temporary, open(temporary, "w", encoding="utf-8") as opened:
        opened.writelines(record_line(record) for record in records)


def is_finished(score_file: Path, predictions: Path, run: Mapping[str, Any], samples: int) -> bool:
    """Whether the files of a finished evaluation can replace a new one.

    Args:
        score_file: ``scores-TASK-GEOMETRY.json``, which has the run and the SHA-256 of its predictions.
        predictions: ``predictions-TASK-GEOMETRY.jsonl``; a killed evaluation may have replaced only this file.
        run: all options and hashes that the answers depend on, as JSON values.
        samples: number of wanted samples, the first ones of the data.
    """
    if not (score_file.is_file() and predictions.is_file()):
        return False
    scores = read_json_object(score_file)
    same_run = scores.get("run") == json.loads(json.dumps(run)) and scores["samples"] >= samples
    return same_run and scores["sha256"] == file_sha256(predictions)


def read_records(predictions: Path, samples: int) -> list[AnswerRecord]:
    """The first records of a finished evaluation."""
    records: list[AnswerRecord] = [record for _, record in read_jsonl(predictions)]
    return records[:samples]
