"""Locks that killed builds of PyTorch extensions left: the next build of the same name waits for ever.

torch.utils.file_baton makes a file ``ROOT/.../NAME/lock``, keeps it open while it builds, and removes it; a process
that is killed removes nothing.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from w2r2_ds.doctor.result import CheckResult

OLD = 600
"""Seconds after which no build is still going on, on whatever node."""


def extension_roots() -> tuple[Path | None, Path]:
    """TORCH_EXTENSIONS_DIR if it is set, and PyTorch's own folder of this user (torch.utils.cpp_extension)."""
    named = os.environ.get("TORCH_EXTENSIONS_DIR")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return (Path(named) if named else None), cache / "torch_extensions"


def check_locks() -> CheckResult:
    """Stale locks in both folders; in PyTorch's own they do not hold this project up, but other programs."""
    outcome = CheckResult()
    named, own = extension_roots()
    if named is not None:
        outcome.wrong += [_sentence(path, "training hangs") for path in stale_locks(named)]
    if named is None or named.resolve() != own.resolve():
        outcome.warnings += [_sentence(path, "programs that build there hang") for path in stale_locks(own)]
    return outcome


def stale_locks(root: Path) -> list[Path]:
    """Locks that no process of this node holds open, and that are old, or in a folder of this node alone."""
    locks = [path for path in root.glob("**/lock") if path.is_file()] if root.is_dir() else []
    if not locks:
        return []
    held = _open_files()
    return [path for path in locks if path.resolve() not in held and (_age(path) > OLD or not on_network(path))]


def on_network(path: Path) -> bool:
    """Whether other nodes may see a path, so that a lock may be theirs: its file system is no local one."""
    import psutil

    mounts = [(Path(each.mountpoint), each.fstype) for each in psutil.disk_partitions(all=True)]
    above = [(len(point.parts), kind) for point, kind in mounts if path.resolve().is_relative_to(point)]
    return max(above, default=(0, ""))[1] not in ("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "tmpfs", "overlay")


def _age(path: Path) -> float:
    """Seconds since it was made; endless for one that has just been removed, which `resolve` then does not find."""
    return time.time() - path.stat().st_mtime


def _open_files() -> set[Path]:
    """Files that processes of this node hold open, as far as this user may see them."""
    found = set()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            found.add(link.readlink())
        except OSError:  # ended meanwhile, or another user's
            continue
    return found


def _sentence(path: Path, what: str) -> str:
    return (
        f"{path} is the lock of a build that was killed ({_age(path):.0f} s old, no process holds it), on which "
        f"{what}; remove it: rm {path}"
    )
