"""Generate docs/reference/config.md, cli.md and the API pages; run by mkdocs-gen-files at every build of the site."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, get_type_hints

import docstring_parser
import yaml

from w2r2_ds.config.options import options
from w2r2_ds.config.schema import RunConfig, SourceConfig
from w2r2_ds.objective.push_terms import PUSH_TERMS

ROOT = Path(__file__).parents[2]
API = {
    "Objective": ("w2r2_ds.objective.push_terms", "w2r2_ds.objective.loss", "w2r2_ds.objective.similarity"),
    "Models": (
        "w2r2_ds.models.w2r2",
        "w2r2_ds.models.fusion",
        "w2r2_ds.models.merger",
        "w2r2_ds.models.geometry.encoder",
        "w2r2_ds.models.geometry.point_map",
        "w2r2_ds.models.geometry.point_transforms",
        "w2r2_ds.models.geometry.resampling",
    ),
    "Data": ("w2r2_ds.types.sample", "w2r2_ds.types.batch", "w2r2_ds.data.prepared_set", "w2r2_ds.data.tasks.base"),
    "Training": ("w2r2_ds.training.step", "w2r2_ds.training.two_pass", "w2r2_ds.training.trackers"),
    "Evaluation": ("w2r2_ds.evaluation.protocols.registry", "w2r2_ds.evaluation.metrics.captions"),
}
"""Title of an API page -> modules whose docstrings it shows."""


Row = tuple[str, str, Any, str]
"""Name, type, default and description of an option."""


def table(rows: Iterable[Row]) -> str:
    """A Markdown table of options, with defaults in YAML."""
    lines = ["| option | type | default | description |", "| --- | --- | --- | --- |"]
    for name, kind, default, text in rows:
        required = default is dataclasses.MISSING
        value = (
            ""
            if required
            else yaml.safe_dump(default, default_flow_style=True, sort_keys=False, width=1000).partition("\n")[0]
        )
        cells = (f"`{name}`", f"`{kind}`", "required" if required else f"`{value}`", text)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def option_rows(config: type) -> list[Row]:
    """Rows of all fields of a configuration dataclass."""
    return [(each.name, each.type, each.default, each.help) for each in options(config).values()]


def push_term_rows() -> Iterator[Row]:
    """Rows of the hyper-parameters of the built-in push terms."""
    for name, term in PUSH_TERMS.items():
        helps = {each.arg_name: each.description for each in docstring_parser.parse(term.__doc__ or "").params}
        for field, about in term.model_fields.items():
            yield f"objective.push_term.{field}", "float", about.default, f"`{name}`: {helps[field]}"


def first_line(config: type, section: str = "") -> str:
    """First docstring line of a configuration dataclass, or of one of its sections such as `model.geometry`."""
    for name in filter(None, section.split(".")):
        config = get_type_hints(config)[name]
    return (config.__doc__ or "").partition("\n")[0]


def config_page() -> str:
    """docs/reference/config.md."""
    sections: dict[str, list[Row]] = {}
    for row in option_rows(RunConfig):
        sections.setdefault(row[0].rpartition(".")[0], []).append(row)
    parts = [
        "# Configuration\n\nGenerated from `w2r2_ds/config/schema.py`. Every row is a field of a recipe and an option "
        "of `launchers/train.py`: `--train.lr 1e-4`. The command line takes precedence over `--config RECIPE.yaml`, "
        "and the recipe over the defaults below. An unknown field is an error.\n",
        *(f"## {name or 'top level'}\n\n{first_line(RunConfig, name)}\n\n{table(sections[name])}" for name in sections),
        f"## entries of data.train and data.val\n\n{first_line(SourceConfig)}\n\n{table(option_rows(SourceConfig))}",
        "## hyper-parameters of push terms\n\nEach belongs to the push term at the start of its description.\n\n"
        + table(push_term_rows()),
    ]
    return "\n".join(parts)


def help_text(launcher: Path, *command: str) -> str:
    """The output of ``python launchers/NAME.py [COMMAND] --help``, from a run of the file in this process."""
    import runpy

    argv, columns, text = sys.argv, os.environ.get("COLUMNS"), io.StringIO()
    sys.argv, os.environ["COLUMNS"] = [str(launcher), *command, "--help"], "110"
    try:
        with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
            runpy.run_path(str(launcher), run_name="__main__")
    finally:
        sys.argv = argv
        if columns is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = columns
    return text.getvalue().replace(str(ROOT) + "/", "").rstrip()


def cli_page() -> str:
    """docs/reference/cli.md."""
    parts = [
        "# Command line\n\nGenerated from `--help` of the launchers. The commands run from the repository root: "
        "`python launchers/NAME.py`, or `deepspeed launchers/NAME.py` to start one process per GPU.\n"
    ]
    for launcher in sorted((ROOT / "launchers").glob("*.py")):
        text = help_text(launcher)
        assert "usage" in text.lower(), f"{launcher}: --help printed no usage"
        parts.append(f"## {launcher.stem}\n\n```text\n{text}\n```\n")
        for name in re.findall(r"^ {4}([\w-]+) {2,}", text.partition("\nsubcommands:")[2], re.MULTILINE):
            parts.append(f"### {launcher.stem} {name}\n\n```text\n{help_text(launcher, name)}\n```\n")
    return "\n".join(parts)


def api_page(title: str, modules: tuple[str, ...]) -> str:
    """One page of the API reference."""
    return f"# {title}\n\n" + "\n".join(f"::: {module}\n" for module in modules)


def pages() -> Iterator[tuple[str, str]]:
    """Every generated page: path below docs/, content."""
    yield "reference/config.md", config_page()
    yield "reference/cli.md", cli_page()
    for title, modules in API.items():
        yield f"reference/api/{title.lower()}.md", api_page(title, modules)


def main() -> None:
    """Add the pages to the build."""
    import mkdocs_gen_files

    for path, text in pages():
        with mkdocs_gen_files.open(path, "w") as file:
            file.write(text)


if __name__ == "<run_path>" or __name__ == "__main__":
    main()
