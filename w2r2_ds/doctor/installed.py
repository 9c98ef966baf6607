"""What is installed: versions against the ranges of pyproject.toml, for required packages and those a run asks for."""

from __future__ import annotations

import platform
import tomllib
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from w2r2_ds.doctor.result import CheckResult

PROJECT = Path(__file__).parents[2] / "pyproject.toml"
NAME = "w2r2-ds"
OWN_EXTRAS = ("flash", "quant", "kernels", "wandb", "tensorboard", "trackio", "metrics")
"""Optional packages that a run may use; those of developers are not looked at."""


@dataclass(frozen=True)
class Wanted:
    """A package and the versions that this project is written against.

    Args:
        name: on the package index.
        versions: as pyproject.toml writes them, ``>=2,<3``.
        extra: the optional group it belongs to, empty for a required one.
    """

    name: str
    versions: str
    extra: str


def wanted_packages() -> list[Wanted]:
    """Required packages, then optional ones; of pyproject.toml beside the code, else of the installed package.

    Raises:
        ValueError: neither is there.
        ImportError: packaging is missing.
    """
    from packaging.requirements import Requirement

    if PROJECT.is_file():
        project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
        groups = {"": project["dependencies"], **{name: project["optional-dependencies"][name] for name in OWN_EXTRAS}}
        texts = [(extra, Requirement(text)) for extra, group in groups.items() for text in group]
    else:
        try:
            found = [Requirement(text) for text in requires(NAME) or []]
        except PackageNotFoundError:
            raise ValueError(f"{NAME} is not installed and {PROJECT} is missing; run make install.") from None
        texts = [(extra, each) for extra in ("", *OWN_EXTRAS) for each in found if _belongs(each.marker, extra)]
    return [Wanted(each.name, str(each.specifier), extra) for extra, each in texts]


def _belongs(marker: Any, extra: str) -> bool:
    """Whether a requirement with this marker (None for none) holds for an extra and not without it; "" is without."""
    always = marker is None or marker.evaluate({"extra": ""})
    return bool(always if not extra else not always and marker.evaluate({"extra": extra}))


def check_versions(needed: frozenset[str]) -> CheckResult:
    """Every required package, and the optional ones that are there or `needed`, against their ranges."""
    outcome = CheckResult(shown={"python": platform.python_version()}, equal={"python": platform.python_version()})
    try:
        from packaging.specifiers import SpecifierSet

        packages = wanted_packages()
    except ImportError as error:
        outcome.wrong.append(f"{error}; without packaging no version can be compared: run make install.")
        return outcome
    for each in packages:
        try:
            found = version(each.name)
        except PackageNotFoundError:
            if not each.extra or each.name in needed:
                what = f'"{NAME}[{each.extra}]"' if each.extra else f'"{each.name}{each.versions}"'
                outcome.wrong.append(f"{each.name} is not installed; pip install {what}.")
            outcome.shown[each.name] = "missing" if not each.extra else f"not there (optional: {each.extra})"
            continue
        outcome.shown[each.name] = f"{found} ({each.versions})"
        outcome.equal[each.name] = found
        if not SpecifierSet(each.versions).contains(found, prereleases=True):
            outcome.wrong.append(
                f"{each.name} is {found}, but this code is written for {each.versions}; "
                f'pip install "{each.name}{each.versions}".'
            )
    try:
        version(NAME)
    except PackageNotFoundError:
        outcome.wrong.append(f"{NAME} itself is not installed, only its code is here; run make install.")
    return outcome
