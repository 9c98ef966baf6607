"""One writer per run: every start of a run takes a token, and who no longer holds it writes nothing more.

A job that was requeued elsewhere while its old ranks live on behind a cut link has two writers. The newer start
replaces RUN/checkpoints/incarnation.json; the older one finds another token there before its next rename and ends.
Between look and rename lies a moment; what could slip through it is a whole checkpoint of the same run and step, since
each writes aside in a folder named after its token and a rename never replaces a folder.
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


class Fenced(ValueError):
    """Another start of the same run has taken over; this one must not write any more."""


@dataclass(frozen=True)
class OwnershipToken:
    """The right to write a run's checkpoints, until another start takes it.

    Attributes:
        folder: RUN/checkpoints.
        number: starts of this run so far, from 1.
        token: 16 random hex digits.
        host, pid, job: of rank 0; `job` is the Slurm job's id, empty without Slurm.
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
        """Take over a run; rank 0 calls it, once nothing the user can mend is left to refuse.

        Folders that earlier starts left half-written are removed.
        """
        folder = Path(run) / "checkpoints"
        folder.mkdir(parents=True, exist_ok=True)
        before = _read(folder / INCARNATION)
        fence = cls(
            folder,
            int(before.get("number", 0)) + 1,
            secrets.token_hex(8),
            socket.gethostname(),
            os.getpid(),
            os.environ.get("SLURM_JOB_ID", ""),
            datetime.now(UTC).isoformat(timespec="seconds"),
        )
        atomic_io.replace(folder / INCARNATION, json.dumps(fence.described(), indent=2) + "\n")
        fence.sweep()
        return fence

    def described(self) -> dict[str, object]:
        """As it is written: everything but the folder."""
        return {name: value for name, value in asdict(self).items() if name != "folder"}

    def check(self) -> None:
        """Call before whatever others can see: a rename, a deletion, a pointer that moves.

        Raises:
            Fenced: another start has taken over, or the file is gone.
        """
        found = _read(self.folder / INCARNATION)
        if found.get("token") == self.token:
            return
        if not found:
            raise Fenced(f"{self.folder / INCARNATION} is gone or unreadable; this run stops without writing more.")
        raise Fenced(
            f"{self.folder.parent} was taken over by start {found.get('number')} (host {found.get('host')}, job "
            f"{found.get('job') or 'none'}, {found.get('started')}); this one, start {self.number} of "
            f"{self.started}, stops without writing more."
        )

    def aside(self, step: int) -> Path:
        """Where this start writes the checkpoint of a step; no other start uses the same folder."""
        return self.folder / f"step-{step:06d}.{self.token}{PARTIAL}"

    def sweep(self) -> None:
        """Remove what killed starts left half-written."""
        for path in self.folder.glob(f"*{PARTIAL}"):
            if self.token in path.name or path.name.startswith(INCARNATION):  # another start may be claiming right now
                continue
            if path.is_dir():
                # A fenced start may still write there; what it adds meanwhile goes with the next start's sweep.
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _read(file: Path) -> dict[str, Any]:
    """The file as JSON; empty where it is missing or damaged. Another OSError says nothing of who holds the run."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
