"""Sections of a diagnosis in the page: those that a run has, and the commands that make the others."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest

from diagnosis_files import TASK, write_diagnoses
from html_elements import Elements
from report_runs import MARKUP
from w2r2_ds.report.collect import RunData, read_run
from w2r2_ds.report.diagnosis.sections import KINDS, diagnosis_sections, missing_sections
from w2r2_ds.report.page import build_page


@pytest.fixture
def run_folder(finished_run: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "my run"
    folder.mkdir()
    shutil.copy(finished_run / "config.yaml", folder)
    return folder


def missing(run: RunData) -> dict[str, str]:
    return dict(missing_sections(run, diagnosis_sections([run]), 0))


def test_all_sections(run_folder: Path) -> None:
    write_diagnoses(run_folder / "evaluation")
    run = read_run(run_folder, "mine")
    sections = diagnosis_sections([run])
    assert [section.kind.key for section in sections] == ["causality", "cues", "features", "attention"]
    assert missing_sections(run, sections, 0) == []
    elements = Elements(build_page([run]))
    keys = [value for name, value in elements.attributes if name == "href" and value.startswith("#")]
    assert [key for key in keys if key[1:] in {kind.key for kind in KINDS}] == [f"#{kind.key}" for kind in KINDS]
    figures = json.loads(elements.figures)
    assert len(figures) == 5 and elements.tags.count("image") == 2
    assert sorted(figures) == sorted(value for name, value in elements.attributes if name == "data-figure")


def test_missing_parts_have_a_command(run_folder: Path, report_root: Path) -> None:
    run = read_run(run_folder, "mine")
    commands = missing(run)
    assert sorted(commands) == ["Attention anchors", "Feature map", "Geometric causality", "Table 1"]
    for title, option in {"Feature map": "--features true", "Attention anchors": "--attention true"}.items():
        assert shlex.split(commands[title]) == ["w2r2", "diagnose", "--checkpoint", str(run_folder), *option.split()]
    assert shlex.quote(str(run_folder)) in Elements(build_page([run])).text
    (report_root / "shortcut_cues").mkdir()  # the data have shifted splits
    try:
        assert "Shortcut cues" in missing(run)
    finally:
        (report_root / "shortcut_cues").rmdir()
    write_diagnoses(run_folder)
    for file in (f"features-{TASK}.json", f"attention-{TASK}.json"):
        (run_folder / file).unlink()
    older = json.loads((run_folder / f"diagnosis-{TASK}.json").read_text())
    del older["causality"], older["cues"]
    (run_folder / f"diagnosis-{TASK}.json").write_text(json.dumps(older))
    assert sorted(missing(read_run(run_folder, "mine"))) == ["Attention anchors", "Feature map", "Geometric causality"]


def test_runs_are_side_by_side_also_if_one_lacks_a_part(run_folder: Path, finished_run: Path, tmp_path: Path) -> None:
    shutil.copytree(run_folder, tmp_path / "other")
    write_diagnoses(tmp_path / "other")
    runs = [read_run(run_folder, "first"), read_run(tmp_path / "other", "second")]
    sections = diagnosis_sections(runs)
    assert all(not section.parts[0] and section.parts[1] for section in sections)
    assert missing_sections(runs[0], sections, 0) and not missing_sections(runs[1], sections, 1)
    page = build_page(runs)
    # The colour of the second run marks its parts.
    section = page[page.index('<h2 id="causality">') : page.index('<h2 id="cues">')]
    assert ">second<" in section.replace("\n", "") and ">first<" not in section and "#d9730d" in section


@pytest.mark.parametrize(
    ("file", "key"),
    [("diagnosis", "causality"), ("diagnosis", "cues"), ("features", "clouds"), ("attention", "passes")],
)
def test_files_of_another_program_are_an_error(run_folder: Path, file: str, key: str) -> None:
    write_diagnoses(run_folder)
    path = run_folder / f"{file}-{TASK}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: {"x": {}}}))
    with pytest.raises(ValueError, match=r"my run.* diagnose --checkpoint"):
        diagnosis_sections([read_run(run_folder, "my run")])


def test_markup_in_a_diagnosis_stays_text(run_folder: Path) -> None:
    write_diagnoses(run_folder, [f"a{MARKUP}", "b"], data=f"prepared/{MARKUP}")
    page = build_page([read_run(run_folder, "mine")])
    elements = Elements(page)
    assert MARKUP not in page and elements.text.count(MARKUP) > 5 and elements.tags.count("script") == 3
    assert "img" not in elements.tags
