"""Checks of installed packages against the ranges of pyproject.toml, and hashes of the code and of the run's files."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from w2r2_ds.doctor.result import CheckResult
from w2r2_ds.utils.files.hashing import files_sha256

DISTRIBUTION = "w2r2-ds"
PACKAGE = Path(__file__).parents[2]
GIT_SECONDS = 5
HASH_DIGITS = 12
TOOLS = ("dev", "docs")
"""Extras for development, which no run needs."""


def check_versions(needed: frozenset[str]) -> CheckResult:
    """Compare the versions of dependencies with their ranges; `needed` are optional ones that must be installed."""
    from packaging.requirements import Requirement

    result = CheckResult(info={"python": platform.python_version()}, must_match={"python": platform.python_version()})
    try:
        requirements = [Requirement(text) for text in requires(DISTRIBUTION) or []]
    except PackageNotFoundError:
        result.errors.append(f"{DISTRIBUTION} is not installed; run make install.")
        return result
    for each in requirements:
        required = each.name in needed or each.marker is None or each.marker.evaluate({"extra": ""})
        if not required and any(each.marker and each.marker.evaluate({"extra": tools}) for tools in TOOLS):
            continue
        try:
            found = version(each.name)
        except PackageNotFoundError:
            if required:
                result.info[each.name] = "missing"
                result.errors.append(f'{each.name} is not installed; pip install "{each.name}{each.specifier}".')
            continue
        result.info[each.name] = f"{found} ({each.specifier})"
        result.must_match[each.name] = found
        if not each.specifier.contains(found, prereleases=True):
            (result.errors if required else result.warnings).append(
                f"{each.name} is {found}, but this code needs {each.specifier}; "
                f'pip install "{each.name}{each.specifier}".'
            )
    return result


def check_code(files: list[str]) -> CheckResult:
    """Hash the code of the package, and the recipe and DeepSpeed JSON in `files`."""
    code = [path for suffix in ("*.py", "*.yaml") for path in PACKAGE.rglob(suffix)]
    result = CheckResult(info={"code": str(PACKAGE)}, must_match={"the code of w2r2_ds": short_hash(code, PACKAGE)})
    if commit := git_commit(PACKAGE.parent):
        result.info["commit"] = commit
    for path in map(Path, files):
        if path.is_file():
            result.must_match[str(path)] = short_hash([path], path.parent)
        else:
            result.errors.append(f"{path} does not exist on this node; put it on a shared file system.")
    return result


def short_hash(files: list[Path], root: Path) -> str:
    """First digits of the SHA-256 of file names and contents."""
    return files_sha256(files, root)[:HASH_DIGITS]


def git_commit(folder: Path) -> str:
    """``git describe`` of a checkout; empty without a checkout or git."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=GIT_SECONDS)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
