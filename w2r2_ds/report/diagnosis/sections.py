"""Sections of a report from the files of ``w2r2 diagnose``: causality, shortcut cues, feature map, attention."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from w2r2_ds.data.sources.shortcut_cues import cues_file
from w2r2_ds.report.collect import RunData
from w2r2_ds.report.diagnosis.attention import attention_part
from w2r2_ds.report.diagnosis.causality import causality_part
from w2r2_ds.report.diagnosis.cues import cue_parts
from w2r2_ds.report.diagnosis.feature_map import feature_part
from w2r2_ds.report.diagnosis.parts import Part


@dataclass(frozen=True)
class Kind:
    """A kind of section.

    Attributes:
        key: anchor of its heading.
        title: its heading.
        note: how to read it.
        make: run -> parts; empty if the run has no file with it.
        option: option of ``w2r2 diagnose`` that makes it.
    """

    key: str
    title: str
    note: str
    make: Callable[[RunData], Sequence[Part]]
    option: str


@dataclass(frozen=True)
class DiagnosisSection:
    """One section, with the parts of every run.

    Attributes:
        kind: its heading and note.
        parts: parts of every run, in the order of the runs.
    """

    kind: Kind
    parts: Sequence[Sequence[Part]]


def _causality(run: RunData) -> list[Part]:
    return [part for part in map(causality_part, run.diagnoses) if part is not None]


def _cues(run: RunData) -> list[Part]:
    return cue_parts(run.diagnoses)


def _features(run: RunData) -> list[Part]:
    return [feature_part(content) for _, content in run.features]


def _attention(run: RunData) -> list[Part]:
    return [attention_part(content, file.parent) for file, content in run.attention]


KINDS = (
    Kind(
        "causality",
        "Geometric causality",
        "The geometry is changed and the pixels stay. Slope and correlation of a number's movement with the movement "
        "that the change demands: 0 ignores the geometry, 1 follows it. Follows: share of answers nearer to the "
        "demanded number than to the original one.",
        _causality,
        "--causality true",
    ),
    Kind(
        "cues",
        "Shortcut cues",
        "In a shifted split, 2D appearance suggests a wrong box, the cue. A model that relies on 2D follows it.",
        _cues,
        "--data SHIFTED_SET --out FOLDER",
    ),
    Kind(
        "features",
        "Feature map",
        "Visual tokens of the vision tower (2D), of the merged geometry (3D), and of their fusion. Distances between "
        "clusters of a t-SNE have no meaning; the measures do not depend on it.",
        _features,
        "--features true",
    ),
    Kind(
        "attention",
        "Attention anchors",
        "Visual tokens that the digits of an answer attend to. The anchor is the token with the highest attention; its "
        "box follows from it with 2D knowledge alone. Heat maps, per frame: red is attention, a white cross the "
        "anchor, a green outline the target; upper row 2D only, lower row 2D + 3D.",
        _attention,
        "--attention true",
    ),
)
"""The sections, in the order of the page."""


def diagnosis_sections(runs: Sequence[RunData]) -> list[DiagnosisSection]:
    """The sections that at least one run has.

    Raises:
        ValueError: a file is not one of ``w2r2 diagnose``, or a heat map is missing.
    """
    sections = [DiagnosisSection(kind, [_parts(kind, run) for run in runs]) for kind in KINDS]
    return [section for section in sections if any(section.parts)]


def _parts(kind: Kind, run: RunData) -> Sequence[Part]:
    try:
        return kind.make(run)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(
            f"{run.name}: a file of w2r2 diagnose has no valid {kind.title.lower()} ({error!r}); make it again with "
            f"{_command(run.folder, kind.option)}."
        ) from None


def missing_sections(run: RunData, sections: Sequence[DiagnosisSection], index: int) -> list[tuple[str, str]]:
    """Title and command of every section that the run has no results for.

    Args:
        run: the run.
        sections: all sections.
        index: number of the run.
    """
    found = {section.kind.key for section in sections if section.parts[index]}
    missing = [kind for kind in KINDS if kind.key not in found]
    if not cues_file(Path(run.config.data.root), "").parent.is_dir():  # the data have no shifted split
        missing = [kind for kind in missing if kind.key != "cues"]
    commands = [(kind.title, _command(run.folder, kind.option)) for kind in missing]
    if not any(each.get("table1") for each in run.diagnoses):
        commands.insert(0, ("Table 1", _command(run.folder, "")))
    return commands


def _command(folder: Path, option: str) -> str:
    return f"w2r2 diagnose --checkpoint {shlex.quote(str(folder))} {option}".strip()
