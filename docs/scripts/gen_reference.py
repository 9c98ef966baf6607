"""Generate docs/reference/config.md, cli.md and the API pages; run by mkdocs-gen-files at every build of the site."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

ROOT = Path(__file__).parents[2]
API = {
    "Objective": ("w2r2_ds.objective.push_terms", "w2r2_ds.objective.loss", "w2r2_ds.objective.similarity"),
    "Models": (
        "w2r2_ds.models.w2r2",
        "w2r2_ds.models.fusion",
        "w2r2_ds.models.merger",
        "w2r2_ds.models.geometry_encoder",
        "w2r2_ds.models.resampling",
    ),
    "Data": ("w2r2_ds.types.sample", "w2r2_ds.types.batch", "w2r2_ds.data.dataset", "w2r2_ds.data.tasks.base"),
    "Training": ("w2r2_ds.training.step", "w2r2_ds.training.two_pass", "w2r2_ds.training.trackers"),
    "Evaluation": ("w2r2_ds.evaluation.protocols.registry", "w2r2_ds.evaluation.metrics.captions"),
}
"""Title of an API page -> modules whose docstrings it shows."""


def field_docs(config: type[Any]) -> dict[str, str]:
    """Descriptions of a dataclass's fields, from the section `Args:` of its docstring."""
    _, _, args = (config.__doc__ or "").partition("Args:")
    found = re.findall(r"^ {4,8}(\w+): (.*(?:\n {9,}.*)*)", args, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in found}


def default_of(field: dataclasses.Field[Any]) -> str:
    """A field's default as it is written in YAML or Python."""
    if field.default is not dataclasses.MISSING:
        return repr(field.default)
    if field.default_factory is not dataclasses.MISSING:
        return repr(field.default_factory())
    return "required"


def config_tables(config: type[Any], prefix: str = "") -> Iterator[str]:
    """One Markdown table per section of the run configuration, nested sections after their parent."""
    hints, docs = get_type_hints(config), field_docs(config)
    rows, nested = [], []
    for field in dataclasses.fields(config):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            nested.append((hint, f"{prefix}{field.name}."))
            continue
        kind = getattr(hint, "__name__", str(hint)) if isinstance(hint, type) else str(hint)
        kind = re.sub(r"typing\.|w2r2_ds\.[\w.]+\.", "", kind)
        cells = (f"`{prefix}{field.name}`", f"`{kind}`", f"`{default_of(field)}`", docs.get(field.name, ""))
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    summary = (config.__doc__ or "").partition("\n")[0]
    yield f"## {prefix.rstrip('.') or 'top level'}\n\n{summary}\n"
    if rows:
        yield "\n".join(["| option | type | default | description |", "| --- | --- | --- | --- |", *rows]) + "\n"
    for hint, name in nested:
        yield from config_tables(hint, name)


def config_page() -> str:
    """docs/reference/config.md."""
    from w2r2_ds.config.schema import RunConfig

    head = (
        "# Configuration\n\nGenerated from `w2r2_ds/config/schema.py`. Every row is a field of a recipe and an option "
        "of `launchers/train.py`: `--train.lr 1e-4`. The command line takes precedence over `--config RECIPE.yaml`, "
        "and the recipe over the defaults below. An unknown field is an error.\n"
    )
    return "\n".join([head, *config_tables(RunConfig)])


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
