"""Which code and settings a node would run: hashes that must be the same everywhere."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Iterable
from pathlib import Path

from w2r2_ds.doctor.result import CheckResult

PACKAGE = Path(__file__).parents[1]
GIT_SECONDS = 5


def check_code(settings: list[str]) -> CheckResult:
    """This package's files, and the recipe and DeepSpeed JSON that the command line names.

    Args:
        settings: paths of recipe and JSON.
    """
    files = [path for kind in ("*.py", "*.yaml") for path in PACKAGE.rglob(kind)]
    outcome = CheckResult(shown={"code": str(PACKAGE)}, equal={"the code of w2r2_ds": content_hash(files, PACKAGE)})
    commit = git_commit(PACKAGE.parent)
    if commit:
        outcome.shown["commit"] = commit
    for text in settings:
        path = Path(text)
        if path.is_file():
            outcome.equal[text] = content_hash([path], path.parent)
        else:
            outcome.wrong.append(f"{text} cannot be seen; put it where every node sees it, or correct the path.")
    return outcome


def content_hash(files: Iterable[Path], root: Path) -> str:
    """12 hexadecimal digits of the names and contents of files below a folder."""
    digest = hashlib.sha256()
    for path in sorted(files):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:12]


def git_commit(folder: Path) -> str:
    """The commit of a checkout, and whether files differ from it; empty where it is none or git is not there."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
            timeout=GIT_SECONDS,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
