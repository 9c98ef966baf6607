"""Ownership token: only the latest launch of a run may write its checkpoints (a fencing token).

A launch is one execution of the training command. A requeued job is a new launch of the same run. Ranks of the old
launch may still be running on a node that lost its connection, and both would write to the same folder. Every launch
therefore replaces RUN/checkpoints/incarnation.json with its own random token, and compares it before every rename,
deletion and pointer update. A launch that finds another token there stops.

An old launch may still rename right after its comparison. This is harmless: each launch writes to a temporary folder
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
from w2r2_ds.utils.files import atomic_io
from w2r2_ds.utils.files.output_folder import make_folder

INCARNATION = "incarnation.json"


class OwnershipLost(ValueError):
    """A newer launch of the same run has taken over; this one must not write any more."""


@dataclass(frozen=True)
class OwnershipToken:
    """The right to write a run's checkpoints, until a newer launch of the run claims it.

    Attributes:
        folder: RUN/checkpoints.
        number: number of this launch, from 1.
        token: 16 random hex digits.
        host: host name of rank 0.
        pid: process id of rank 0.
        job: Slurm job id, empty without Slurm.
        started: time of the claim, UTC, ISO 8601.
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
        """Take over a run and remove temporary folders of earlier launches. On rank 0 only, after all input checks."""
        folder = Path(run) / "checkpoints"
        make_folder(folder)
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
        # An atomic rename: of two launches that claim at the same time, the later rename wins and the other one stops
        # at its next check.
        atomic_io.replace(folder / INCARNATION, json.dumps(token.to_json(), indent=2) + "\n")
        token.remove_partial()
        return token

    def to_json(self) -> dict[str, object]:
        """Content of incarnation.json: all fields but the folder."""
        return {name: value for name, value in asdict(self).items() if name != "folder"}

    def check(self) -> None:
        """Check that this launch still owns the run; called before each rename, deletion and pointer update.

        Raises:
            OwnershipLost: a newer launch has taken over, or the file is gone.
        """
        found = _read(self.folder / INCARNATION)
        if found.get("token") == self.token:
            return
        if not found:
            raise OwnershipLost(
                f"{self.folder / INCARNATION} is missing or damaged; this launch stops without writing more."
            )
        raise OwnershipLost(
            f"{self.folder.parent} was taken over by launch {found.get('number')} (host {found.get('host')}, job "
            f"{found.get('job') or 'none'}, {found.get('started')}); this one, launch {self.number} of "
            f"{self.started}, stops without writing more."
        )

    def temporary_folder(self, step: int) -> Path:
        """Folder in which this launch writes the checkpoint of a step; no other launch uses it."""
        return self.folder / f"step-{step:06d}.{self.token}{PARTIAL}"

    def remove_partial(self) -> None:
        """Remove the temporary folders and files of earlier launches."""
        for path in self.folder.glob(f"*{PARTIAL}"):
            # A temporary incarnation.json belongs to a launch that is claiming right now.
            if self.token in path.name or path.name.startswith(INCARNATION):
                continue
            if path.is_dir():
                # An old launch may still write there: files that it adds meanwhile are removed by the next launch.
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _read(file: Path) -> dict[str, Any]:
    """Content of incarnation.json; empty if the file is missing or damaged.

    Other OSErrors are raised: a temporary failure of a network file system is no loss of ownership.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
