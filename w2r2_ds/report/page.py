"""Build the page of a report: one HTML file with styles, scripts, plotly.js and all pictures inside."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.graph_objects import Figure
from plotly.offline import get_plotlyjs

from w2r2_ds import __version__
from w2r2_ds.config.options import dotted
from w2r2_ds.report.collect import RunData
from w2r2_ds.report.curves import COLORS, MAX_POINTS, curves
from w2r2_ds.report.diagnosis.sections import diagnosis_sections, missing_sections
from w2r2_ds.report.gallery import KINDS, Answered, answered_samples, boxes_of, choose
from w2r2_ds.report.pictures import Card, make_card
from w2r2_ds.report.room import BOX_STYLES, room_figure
from w2r2_ds.report.scores import GEOMETRY_NAMES, ScoreTable, diagnosis_tables, score_table
from w2r2_ds.report.training_pictures import StepPicture, step_pictures

logger = logging.getLogger(__name__)

MAX_BYTES = 15_000_000


@dataclass(frozen=True)
class Room:
    """A 3D view.

    Attributes:
        title: scene and question.
        figure: key in the page's figures.
        problem: why there are no points; empty if there are.
    """

    title: str
    figure: str
    problem: str


@dataclass(frozen=True)
class RunSection:
    """What the page shows of one run, besides its curves.

    Attributes:
        run: the run.
        tables: scores.
        diagnoses: tables of its diagnoses.
        cards: gallery, by task.
        rooms: 3D views.
        steps: pictures of samples during training.
        problems: why there is no gallery, by group.
    """

    run: RunData
    tables: Sequence[ScoreTable]
    diagnoses: Sequence[ScoreTable]
    cards: Mapping[str, Sequence[Card]]
    rooms: Sequence[Room]
    steps: Sequence[StepPicture]
    problems: Sequence[str] = ()


@dataclass
class Figures:
    """Figures of the page, by key.

    Attributes:
        texts: key -> JSON.
    """

    texts: dict[str, str] = field(default_factory=dict)

    def add(self, figure: Figure) -> str:
        """Add a figure; returns its key."""
        key = f"figure-{len(self.texts)}"
        self.texts[key] = str(figure.to_json())  # numpy arrays in base64
        return key

    @property
    def script(self) -> Markup:
        """All figures as JSON that can stand inside a script element: ``<`` and ``&`` are written as ``\\u003c``."""
        text = "{" + ",".join(f"{json.dumps(key)}:{value}" for key, value in self.texts.items()) + "}"
        for character in "<>&\u2028\u2029":
            text = text.replace(character, f"\\u{ord(character):04x}")
        return Markup(text)


def build_page(runs: Sequence[RunData], samples: int = 12, rooms: int = 2) -> str:
    """The HTML of a report.

    Args:
        runs: one run, or several that are shown side by side.
        samples: samples in the gallery of each task and run.
        rooms: 3D views of each run.

    Raises:
        ValueError: a file cannot be read, or the page has more than ``MAX_BYTES``.
    """
    figures = Figures()
    sections = [run_section(run, figures, samples, rooms) for run in runs]
    diagnosed = diagnosis_sections(runs)
    loader = Environment(
        loader=PackageLoader("w2r2_ds.report"),
        autoescape=True,  # every text of a run is untrusted: names, questions and answers may contain markup
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    drawn = {
        title: {name: figures.add(figure) for name, figure in by_name.items()}
        for title, by_name in curves(runs).items()
    }
    page = loader.get_template("page.html.j2").render(
        title=", ".join(run.name for run in runs),
        version=__version__,
        sections=sections,
        options=differing_options(runs),
        curves=drawn,
        thinned=MAX_POINTS if any(len(run.metrics) > MAX_POINTS for run in runs) else 0,
        diagnosed=diagnosed,
        missing=[missing_sections(run, diagnosed, index) for index, run in enumerate(runs)],
        colors=[COLORS[index % len(COLORS)] for index in range(len(runs))],
        kinds=KINDS,
        geometry_names=GEOMETRY_NAMES,
        box_styles=BOX_STYLES,
        figures=figures,
        plotlyjs=Markup(get_plotlyjs()),
    )
    size = len(page.encode())
    if size > MAX_BYTES:
        raise ValueError(
            f"the page has {size / 1e6:.1f} MB, more than {MAX_BYTES / 1e6:.0f}; pass a smaller --samples."
        )
    return page


def run_section(run: RunData, figures: Figures, samples: int, rooms: int) -> RunSection:
    """Tables, gallery and 3D views of one run; 3D figures are added to `figures`."""
    galleries: list[tuple[str, list[tuple[str, Answered]]]] = []
    problems = []
    for group in run.groups:
        try:
            answered = answered_samples(group, run.config)
        except ValueError as error:  # the data may have been moved; scores and curves are still worth a report
            logger.warning("%s: no gallery of %s (%s)", run.name, group.task, error)
            problems.append(f"No gallery of {group.task}: {error}")
            continue
        chosen = choose(answered, samples)
        if chosen:
            galleries.append((f"{group.title}, by {chosen[0][1].measure}", chosen))
    galleries.sort(key=lambda gallery: not _predicts_boxes(gallery[1]))  # stable
    views: list[Room] = []
    for _, chosen in galleries:
        views += _rooms(run, [each for _, each in chosen], figures, rooms - len(views))
    cards = {title: [make_card(kind, each) for kind, each in chosen] for title, chosen in galleries}
    return RunSection(
        run,
        [score_table(group) for group in run.groups],
        [table for diagnosis in run.diagnoses for table in diagnosis_tables(diagnosis)],
        cards,
        views,
        step_pictures(run.folder),
        problems,
    )


def _predicts_boxes(chosen: Sequence[tuple[str, Answered]]) -> bool:
    """Whether an answer is a box: such samples come first, because the pictures show it beside the true box."""
    return any(name != "true" for _, each in chosen for name in boxes_of(each))


def _rooms(run: RunData, chosen: Sequence[Answered], figures: Figures, count: int) -> list[Room]:
    """3D views of the first samples with boxes, each of another scene."""
    views: dict[str, Room] = {}
    for answered in chosen:
        sample, boxes = answered.sample, boxes_of(answered)
        if len(views) >= count or not boxes or sample.scene_id in views:
            continue
        root = Path(run.config.data.root)
        figure, problem = room_figure(root, sample, boxes)
        views[sample.scene_id] = Room(f"{sample.scene_id}: {sample.id}", figures.add(figure), problem)
    return list(views.values())


def differing_options(runs: Sequence[RunData]) -> list[tuple[str, list[str]]]:
    """Options whose values differ between the runs: dotted name, and the value of each run."""
    from dataclasses import asdict

    trees = [dict(dotted(asdict(run.config))) for run in runs]
    names = dict.fromkeys(name for tree in trees for name in tree)
    rows = [(name, [str(tree.get(name, "")) for tree in trees]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1]
