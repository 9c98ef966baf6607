"""Read and write run configurations: command line, YAML recipes, the saved configuration of a run."""

from __future__ import annotations

from dataclasses import asdict, replace
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentError

from w2r2_ds.config.cli import Parser, plain
from w2r2_ds.config.safe_yaml import SECTIONS, Recipe, code_in, importing_nothing, section
from w2r2_ds.config.schema import (
    DataConfig,
    DemoConfig,
    ModelConfig,
    ObjectiveConfig,
    RunConfig,
    SourceConfig,
    TrainConfig,
)
from w2r2_ds.utils import atomic_io

RECIPES = Path(__file__).parents[1] / "recipes"


def parser(description: str, with_demo: bool = True) -> Parser:
    """A parser whose options are the fields of `RunConfig`; `with_demo` takes the demo recipe as defaults."""
    defaults: list[str | PathLike[Any]] = [RECIPES / "demo.yaml"] if with_demo else []
    result = Parser(description=description, default_config_files=defaults)
    result.allow_abbrev = False  # an abbreviated --config would not be seen by `names_config`
    result.add_argument("--config", action=Recipe, help="YAML recipe; its keys are the options below.")
    result.add_class_arguments(RunConfig)
    for action in result._actions:
        if action.dest in SECTIONS:
            action.type = section
    return result


def train_parser(description: str, args: list[str], needs_deepspeed: bool = True) -> Parser:
    """`parser`, with what else launchers/train.py takes; for it and for whoever takes the same command line."""
    result = parser(description, with_demo=not names_config(args))
    result.add_argument(
        "--deepspeed", required=needs_deepspeed, help="DeepSpeed JSON: ZeRO, precision, offload, clipping."
    )
    result.add_argument("--local_rank", type=int, default=-1, help="Set by the deepspeed launcher.")
    return result


def names_config(args: list[str]) -> bool:
    """Whether a command line names a recipe; then the demo recipe is not looked at."""
    return any(arg == "--config" or arg.startswith("--config=") for arg in args)


def from_tree(tree: dict[str, Any]) -> RunConfig:
    """Build the typed configuration from nested dictionaries, as `asdict` makes them."""
    sections = {
        "data": DataConfig,
        "model": ModelConfig,
        "objective": ObjectiveConfig,
        "train": TrainConfig,
        "demo": DemoConfig,
    }
    values = {name: kind(**tree[name]) for name, kind in sections.items()}
    for name in ("train", "val"):
        setattr(values["data"], name, [SourceConfig(**source) for source in tree["data"][name]])
    return RunConfig(out=tree["out"], resume=tree["resume"], **values)


def from_values(tree: Any, where: str) -> RunConfig:
    """`from_tree` of a file that somebody else may have written: checked as a recipe is.

    Raises:
        ValueError: a field is unknown or its value is of another type; `where` names the file.
    """
    for problem in code_in(tree):
        raise ValueError(f"{where}: {problem}.")
    reader = parser("", with_demo=False)
    reader.exit_on_error = False
    try:
        with importing_nothing():
            values = reader.parse_object(tree)
        return from_tree(values.as_dict())
    except (ArgumentError, TypeError) as error:
        raise ValueError(f"{where}: {plain(str(error))}; it was written by another version, or changed.") from None


def config_first(args: list[str]) -> list[str]:
    """The same command line with `--config` in front, so that every other option wins over the recipe."""
    front: list[str] = []
    rest: list[str] = []
    words = iter(args)
    for word in words:
        if word == "--config":
            front += [word, *[value for value in [next(words, None)] if value is not None]]
        else:
            (front if word.startswith("--config=") else rest).append(word)
    return front + rest


def load_config(path: str | Path | None = None, overrides: list[str] | None = None) -> RunConfig:
    """The configuration of a YAML file (demo recipe without one) with command-line style overrides."""
    args = (["--config", str(path)] if path else []) + (overrides or [])
    return from_tree(parser("", with_demo=not names_config(args)).parse_args(config_first(args)).as_dict())


def relocated(
    config: RunConfig, root: str | Path | None = None, vlm: str | None = None, vggt: str | None = None
) -> RunConfig:
    """The same run with its data and models elsewhere; None leaves a place as it is.

    What the merger started from is forgotten: the trained one takes its place. Kernels that need a GPU become auto.
    """
    kernels: Literal["auto", "torch"] = "torch" if config.model.kernels == "torch" else "auto"
    return replace(
        config,
        data=replace(config.data, root=str(root or config.data.root)),
        model=replace(
            config.model, vlm=vlm or config.model.vlm, vggt=vggt or config.model.vggt, merger="", kernels=kernels
        ),
    )


def config_text(config: RunConfig) -> str:
    """The resolved configuration as YAML that `--config` reads back."""
    return str(yaml.safe_dump(asdict(config), sort_keys=False))


def save_config(config: RunConfig, path: Path) -> None:
    """Write the resolved configuration."""
    atomic_io.replace(path, config_text(config))
