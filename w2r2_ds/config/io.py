"""Read and write run configurations: recipes, command lines, the saved configuration of a run.

A recipe is YAML, read with `yaml.safe_load`. Options of the command line are merged into it, and pydantic validates the
result. No value of a configuration is executed or imported.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import TypeAdapter, ValidationError

from w2r2_ds.config.cli import OneLineParser, did_you_mean
from w2r2_ds.config.options import FREE_SECTIONS, add_options, dotted, options, set_option
from w2r2_ds.config.schema import ModelConfig, RunConfig
from w2r2_ds.utils.files import atomic_io

RECIPES = Path(__file__).parents[1] / "recipes"
DEMO_RECIPE = RECIPES / "demo.yaml"
DEMO_RECIPES = {"point_map": DEMO_RECIPE, "vggt": RECIPES / "demo_vggt.yaml"}
"""Recipe of the demo by `demo.geometry`."""
WITHOUT_RECIPE = ("out", "resume", "demo.")
"""Options that are allowed without `--config`, when the run is the demo; real models need a recipe."""

_ADAPTER = TypeAdapter(RunConfig)


def from_tree(tree: Any, source: str) -> RunConfig:
    """Build the configuration from nested dictionaries, as YAML or `asdict` makes them.

    Args:
        tree: sections and fields.
        source: file, for messages.

    Raises:
        ValueError: a field is unknown or missing, or has a wrong type or value.
    """
    return _validated(_ADAPTER, tree, source)


def model_from_tree(tree: Any, source: str) -> ModelConfig:
    """Build the section `model` only; see `from_tree`."""
    return _validated(TypeAdapter(ModelConfig), tree, source)


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a recipe or a saved configuration.

    Args:
        path: YAML file; None for the demo's recipe.
        overrides: options of a command line, which take precedence over the file.

    Raises:
        ValueError: the file cannot be read, or see `from_tree`.
    """
    parser = run_parser("")
    parser.exit_on_error = False  # raise ValueError instead: the caller is Python, not a command line
    given, rest = _given(parser, overrides)
    recipe = rest.config or path or demo_recipe(given)
    return from_tree(merged(read_yaml(recipe), given), _source(recipe, given))


def demo_recipe(given: Mapping[str, Any]) -> Path:
    """The demo's recipe for the options of a command line; an unknown `demo.geometry` is an error of that recipe."""
    return DEMO_RECIPES.get(given.get("demo", {}).get("geometry"), DEMO_RECIPE)


def run_parser(description: str, prog: str | None = None) -> OneLineParser:
    """A parser with the fields of `RunConfig` and `--config` as options."""
    usage = "%(prog)s [--config RECIPE.yaml] [--section.field VALUE ...]"
    parser = OneLineParser(prog=prog, usage=usage, description=description, allow_abbrev=False)
    parser.add_argument("--config", metavar="RECIPE", help="YAML recipe; its keys are the options below.")
    add_options(parser, RunConfig)
    return parser


def parse_run(parser: OneLineParser, args: Sequence[str]) -> tuple[RunConfig, argparse.Namespace]:
    """Parse a command line. The other options take precedence over `--config`, which takes precedence over defaults.

    Without `--config` the demo's recipe is used. Then only `WITHOUT_RECIPE` and the parser's additional options are
    allowed, so that no real model is trained with the demo's learning rate.

    Args:
        parser: result of `run_parser`, with additional options or not.
        args: command line without the program's name.

    Returns:
        The configuration, and the values of the parser's additional options.
    """
    given, rest = _given(parser, args)
    recipe = rest.config or str(demo_recipe(given))
    if rest.config is None:
        for name, _ in dotted(given):
            if not name.startswith(WITHOUT_RECIPE):
                parser.error(f"--{name} needs --config RECIPE.yaml; without a recipe the demo runs")
    try:
        return from_tree(merged(read_yaml(recipe), given), _source(recipe, given)), rest
    except ValueError as error:
        parser.error(str(error).rstrip("."))


def read_yaml(path: str | Path) -> Any:
    """Decode a YAML file into dictionaries, lists, strings and numbers; no other Python object is constructed.

    Raises:
        ValueError: it is not a regular file, cannot be read, or is not YAML.
    """
    path = Path(path).expanduser()
    try:
        regular = path.is_file()
    except OSError:  # a name that is too long
        regular = False
    if not regular:
        raise ValueError(f"{path} is not a regular file.")
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8-sig"))  # with or without a byte order mark
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}).") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:  # ValueError: not UTF-8, or an impossible date
        cause = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path} is not valid YAML ({cause}).") from None


def merged(tree: Any, given: Mapping[str, Any]) -> Any:
    """Copy of `tree` in which the values of `given` replace its own, section by section."""
    if not isinstance(tree, Mapping) or not given:
        return tree
    result = dict(tree)
    for key, value in given.items():
        inner = result.get(key)
        if key in FREE_SECTIONS and isinstance(inner, str):  # the short form, `push_term: margin`
            inner = {"name": inner}
        result[key] = merged(inner or {}, value) if isinstance(value, Mapping) else value
    return result


def relocated(
    config: RunConfig, root: str | Path | None = None, vlm: str | None = None, geometry_path: str | None = None
) -> RunConfig:
    """Copy of a run's configuration for evaluation or export, with other paths of data and models.

    The path of the merger's initial weights is removed, because the trained weights replace them. `model.kernels`
    triton and `model.attention` flash_attention_2 become auto, so that it also works without a GPU or flash-attn.

    Args:
        config: configuration of the run.
        root: new `data.root`; None keeps it, as for the other paths.
        vlm: new `model.vlm`.
        geometry_path: new `model.geometry.path`.
    """
    kernels: Literal["auto", "torch"] = "torch" if config.model.kernels == "torch" else "auto"
    attention = "auto" if config.model.attention == "flash_attention_2" else config.model.attention
    geometry = replace(config.model.geometry, path=geometry_path or config.model.geometry.path)
    model = replace(config.model, geometry=geometry, merger="", kernels=kernels, attention=attention)
    model = replace(model, vlm=vlm or model.vlm)
    return replace(config, data=replace(config.data, root=str(root or config.data.root)), model=model)


def config_text(config: RunConfig) -> str:
    """The resolved configuration as YAML, a valid file for `--config`."""
    return str(yaml.safe_dump(asdict(config), sort_keys=False))


def save_config(config: RunConfig, path: Path) -> None:
    """Write the resolved configuration as YAML."""
    atomic_io.replace(path, config_text(config))


def _given(parser: OneLineParser, args: Sequence[str]) -> tuple[dict[str, Any], argparse.Namespace]:
    """Options of the configuration as nested dictionaries, and the parser's additional options."""
    rest, unknown = parser.parse_known_args(list(args))
    given: dict[str, Any] = {}
    for name in options(RunConfig):
        if name in rest:  # defaults are argparse.SUPPRESS: `rest` has only options that were passed
            set_option(given, name, getattr(rest, name))
            delattr(rest, name)
    parser.take_free_options(unknown, given)
    return given, rest


def _source(path: str | Path, given: Mapping[str, Any]) -> str:
    """Source of a configuration, for messages."""
    return f"{path} with the command line" if given else str(path)


def _validated(adapter: TypeAdapter[Any], tree: Any, source: str) -> Any:
    """Validate nested dictionaries with pydantic; see `from_tree`."""
    if not isinstance(tree, Mapping):
        raise ValueError(f"{source}: expected sections and fields, got {type(tree).__name__}.")
    try:
        return adapter.validate_python(tree)
    except ValidationError as error:
        raise ValueError(f"{source}: {'; '.join(map(_sentence, error.errors()))}.") from None
    except RecursionError:
        raise ValueError(f"{source}: a value of objective.push_term contains itself.") from None


def _sentence(error: Any) -> str:
    """One error of pydantic's `ValidationError.errors()`, as text."""
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error["loc"]).removeprefix(".")
    if error["type"] == "unexpected_keyword_argument":
        return f"there is no option {name}{did_you_mean(name, options(RunConfig))}"
    if error["type"] == "value_error":  # raised by a __post_init__; its message has the names of the fields
        return str(error["ctx"]["error"]).rstrip(".")
    shown = repr(error["input"])
    return f"{name}: {error['msg']}, got {shown if len(shown) <= 60 else shown[:60] + '...'}"
