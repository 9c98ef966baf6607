"""Ownership token: only the latest start of a run may write its checkpoints (a fencing token).

A requeued job may run while ranks of the old job are still running on a node that lost its connection. Both would
write to the same folder. Every start therefore replaces RUN/checkpoints/incarnation.json with its own random token, and
compares it before every rename, deletion and pointer update. A start that finds another token there stops.

An old start may still rename right after its comparison. This is harmless: each start writes to a temporary folder
named after its token, and a rename never merges folders, so at worst it publishes a complete checkpoint of that step.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from w2r2_ds.training.checkpoint.manifest import PARTIAL
from w2r2_ds.utils import atomic_io

INCARNATION = "incarnation.json"


class OwnershipLost(ValueError):
    """Another start of the same run has taken over; this one must not write any more."""


@dataclass(frozen=True)
class OwnershipToken:
    """The right to write a run's checkpoints, until another process of the run claims it.

    Attributes:
        folder: RUN/checkpoints.
        number: starts of this run so far, from 1.
        token: 16 random hex digits.
        host, pid, job: of rank 0; `job` is the Slurm job id, empty without Slurm.
        started: UTC, ISO 8601.
    """

    folder: Path
    number: int
    token: str
    host: str
    pid: int
    job: str
    started: str

    @classmethod
    def claim(cls, run: str | Path) -> OwnershipToken:
        """Take over a run and remove temporary folders of earlier starts. Rank 0 calls it, after all input checks."""
        folder = Path(run) / "checkpoints"
        folder.mkdir(parents=True, exist_ok=True)
        before = _read(folder / INCARNATION)
        token = cls(
            folder,
            int(before.get("number", 0)) + 1,
            secrets.token_hex(8),
            socket.gethostname(),
            os.getpid(),
            os.environ.get("SLURM_JOB_ID", ""),
            datetime.now(UTC).isoformat(timespec="seconds"),
        )
        # An atomic replacement: of two starts that claim at once, the later rename wins and the other one stops.
        atomic_io.replace(folder / INCARNATION, json.dumps(token.to_json(), indent=2) + "\n")
        token.remove_partial()
        return token

    def to_json(self) -> dict[str, object]:
        """Content of the file: all fields but the folder."""
        return {name: value for name, value in asdict(self).items() if name != "folder"}

    def check(self) -> None:
        """Compare the token; called before everything that other starts can see: renames, deletions, pointers.

        Raises:
            OwnershipLost: another process of this run has taken over, or the file is gone.
        """
        found = _read(self.folder / INCARNATION)
        if found.get("token") == self.token:
            return
        if not found:
            raise OwnershipLost(
                f"{self.folder / INCARNATION} is gone or unreadable; this run stops without writing more."
            )
        raise OwnershipLost(
            f"{self.folder.parent} was taken over by start {found.get('number')} (host {found.get('host')}, job "
            f"{found.get('job') or 'none'}, {found.get('started')}); this one, start {self.number} of "
            f"{self.started}, stops without writing more."
        )

    def temporary_folder(self, step: int) -> Path:
        """Folder in which this start writes the checkpoint of a step; no other start uses it."""
        return self.folder / f"step-{step:06d}.{self.token}{PARTIAL}"

    def remove_partial(self) -> None:
        """Remove the temporary folders and files of earlier starts."""
        for path in self.folder.glob(f"*{PARTIAL}"):
            # A temporary incarnation.json belongs to a start that is claiming right now.
            if self.token in path.name or path.name.startswith(INCARNATION):
                continue
            if path.is_dir():
                # An old start may still write there; what it adds meanwhile is removed by the next start.
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _read(file: Path) -> dict[str, Any]:
    """The file as JSON; empty if it is missing or damaged.

    Other OSErrors are raised: a network file system that fails for a moment does not mean that ownership is lost.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
