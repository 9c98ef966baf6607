"""The page of a report: one file, escaped, with all parts; the command that writes it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from html_elements import Elements
from report_runs import MARKUP
from w2r2_ds.commands import report
from w2r2_ds.report import page
from w2r2_ds.report.collect import read_run
from w2r2_ds.report.curves import COLORS
from w2r2_ds.report.page import Figures, build_page, differing_options
from w2r2_ds.training.fault_tolerance.exit_codes import DONE, FAILED


@pytest.fixture(scope="module")
def html(finished_run: Path) -> str:
    return build_page([read_run(finished_run, "margin")], samples=6, rooms=1)


@pytest.fixture(autouse=True)
def without_plotly(html: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages without the 5 MB of plotly.js, which are slow to parse; `html`, which has it, is made before."""
    monkeypatch.setattr(page, "get_plotlyjs", lambda: "// plotly.js")


def test_the_page_loads_nothing_and_is_small(html: str) -> None:
    elements = Elements(html)
    links = [value for name, value in elements.attributes if name in ("src", "href", "action", "data", "poster")]
    assert links and all(link.startswith(("#", "data:image/jpeg;base64,")) for link in links)
    assert 4e6 < len(html.encode()) < 8e6
    policy = next(value for name, value in elements.attributes if value.startswith("default-src"))
    assert "default-src 'none'" in policy and "http" not in policy


def test_all_parts_are_there(html: str, finished_run: Path) -> None:
    elements = Elements(html)
    run = read_run(finished_run, "margin")
    for text in ("Scores", "Rooms", "Samples", "Curves", "Configuration", str(finished_run), run.config_text):
        assert text in elements.text
    assert "scanrefer/vgllm-direct acc@0.25" in elements.text and "I cannot find it." in elements.text
    figures = json.loads(elements.figures)
    wanted = [value for name, value in elements.attributes if name == "data-figure"]
    assert sorted(wanted) == sorted(figures) and len(wanted) == len(set(wanted))
    kinds = [figure["data"][0]["type"] for figure in figures.values()]
    assert kinds.count("scatter3d") == 1
    names = {name for _, values in run.metrics for name in values} - {"step"}
    assert kinds.count("scatter") == len(names)
    assert elements.tags.count("article") == 6 and elements.tags.count("image") >= 6


def test_markup_in_any_text_stays_text(hostile_run: Path) -> None:
    html = build_page([read_run(hostile_run, hostile_run.name)], samples=6, rooms=1)
    assert MARKUP not in html
    elements = Elements(html)
    assert elements.tags.count("script") == 3 and "img" not in elements.tags  # plotly.js, figures, page.js
    assert all("onmouseover" not in name and "onerror" not in name for name, _ in elements.attributes)
    # Question, label or answer, object name, id, model name: all are shown as they are.
    assert elements.text.count(MARKUP) > 10 and hostile_run.name in elements.text
    assert "</script" not in elements.figures
    json.loads(elements.figures)


def test_several_runs_are_side_by_side(finished_run: Path, tmp_path: Path) -> None:
    other = tmp_path / "none"
    shutil.copytree(finished_run, other)
    text = (other / "config.yaml").read_text().replace("name: margin", "name: none")
    (other / "config.yaml").write_text(text)
    runs = [read_run(finished_run, "margin"), read_run(other, "none")]
    assert differing_options(runs) == [("objective.push_term.name", ["margin", "none"])]
    elements = Elements(build_page(runs, samples=2, rooms=0))
    figures = json.loads(elements.figures)
    assert all([trace["name"] for trace in figure["data"]] == ["margin", "none"] for figure in figures.values())
    assert elements.tags.count("article") == 4 and "Options that differ" in elements.text


def test_a_run_without_data_has_scores_and_curves(finished_run: Path, report_root: Path, tmp_path: Path) -> None:
    run = tmp_path / "moved"
    shutil.copytree(finished_run, run)
    shutil.copytree(run / "evaluation", run / "second")
    for folder, place in (("evaluation", "/nowhere"), ("second", "/elsewhere")):
        for file in (run / folder).glob("scores-*.json"):
            file.write_text(file.read_text().replace(str(report_root), place))
    # The second run has a room, the first one none: the room has the colour of the second.
    html = build_page([read_run(run, "moved"), read_run(finished_run, "whole")], samples=1, rooms=1)
    elements = Elements(html)
    for place in ("/nowhere", "/elsewhere"):
        assert f"No gallery of scanrefer: {place}/prepared" in elements.text
    assert "acc@0.25" in elements.text and elements.tags.count("article") == 1
    assert "data-figure" in dict(elements.attributes)
    (rooms,) = re.findall(r'<h2 id="rooms">.*?<h2', html, re.DOTALL)
    assert re.findall(r"background:(#\w+)", rooms) == [COLORS[1]]


def test_a_run_without_results(finished_run: Path, tmp_path: Path) -> None:
    shutil.copy(finished_run / "config.yaml", tmp_path)
    elements = Elements(build_page([read_run(tmp_path, "new")]))
    assert "0 of 60 steps" in elements.text and elements.figures == "{}"


def test_a_page_that_is_too_large_is_an_error(finished_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "MAX_BYTES", 10_000)
    with pytest.raises(ValueError, match="--samples"):
        build_page([read_run(finished_run, "margin")], samples=1, rooms=0)


def test_figures_can_stand_in_a_script() -> None:
    figures = Figures({"a": json.dumps("</script><!-- & \u2028")})
    assert not set("<>&\u2028") & set(figures.script)
    assert json.loads(str(figures.script)) == {"a": "</script><!-- & \u2028"}


def test_the_command_writes_the_page(finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    assert report.main(["--run", str(run), "--samples", "1", "--rooms", "0"]) == DONE
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    assert Elements((run / "report.html").read_text()).tags.count("article") == 1
    out = tmp_path / "new" / "both.html"
    words = ["--run", str(run), "--run", str(finished_run), "--out", str(out), "--samples", "0", "--rooms", "0"]
    assert report.main(words) == DONE
    assert "article" not in Elements(out.read_text()).tags


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--run", "{nowhere}"], "config.yaml"),
        (["--run", "{run}", "--run", "{run}"], "--run"),
        (["--run", "{run}", "--run", "{nowhere}", "--results", "{run}"], "--results"),
        (["--run", "{run}", "--samples", "-1"], "--samples"),
        (["--run", "{run}", "--rooms", "-1"], "--rooms"),
    ],
)
def test_errors_name_the_option(
    finished_run: Path, tmp_path: Path, words: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    filled = [word.format(run=finished_run, nowhere=tmp_path) for word in words]
    assert report.main([*filled, "--out", str(tmp_path / "x.html")]) == FAILED
    assert named in capsys.readouterr().err and not (tmp_path / "x.html").exists()
