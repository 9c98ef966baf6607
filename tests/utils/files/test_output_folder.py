"""Output folders: complete or absent, links, mount points, files, folders that cannot be written, full disks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fork_server import environment
from w2r2_ds.data.prepare import pipeline
from w2r2_ds.evaluation.resumable import PartialAnswers
from w2r2_ds.training.checkpoint.ownership import OwnershipToken
from w2r2_ds.training.metrics import MetricsLogger
from w2r2_ds.utils.files import output_folder
from w2r2_ds.utils.files.file_lock import locked
from w2r2_ds.utils.files.output_folder import check_writable, fill, make_folder, new_folder


def write(out: Path, **options: object) -> list[str]:
    """Write a file and a folder to `out`; returns the entries of `out`."""
    with new_folder(out, **options) as folder:  # type: ignore[arg-type]
        assert not list(folder.iterdir())
        (folder / "file").write_text("content")
        (folder / "inner").mkdir()
        (folder / "inner" / "file").write_text("content")
    assert (out / "file").read_text() == (out / "inner" / "file").read_text() == "content"
    return sorted(os.listdir(out))


def test_a_new_folder_is_complete_or_absent(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    with pytest.raises(KeyError), new_folder(out) as folder:
        (folder / "file").write_text("half")
        assert not out.exists()
        raise KeyError
    assert not list((tmp_path / "new").iterdir())
    assert write(out) == ["file", "inner"] and os.listdir(tmp_path / "new") == ["out"]


@pytest.mark.parametrize("case", ["empty", "link", "dangling link", "relative", "lost+found", "left by a killed call"])
def test_an_empty_folder_is_filled(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, out = tmp_path / "disk", tmp_path / "out"
    disk.mkdir()
    expected = ["file", "inner"]
    if case in ("link", "dangling link"):
        real = disk / "real"
        if case == "link":
            real.mkdir()
        out.symlink_to(real)
    elif case == "relative":
        monkeypatch.chdir(disk)
        out = Path("out")
    else:
        out.mkdir()
    if case == "lost+found":
        (out / "lost+found").mkdir()
        expected = [*expected, "lost+found"]
    if case == "left by a killed call":
        (out / "out.partial").mkdir()
        (out / "out.partial" / "old").write_text("")
    assert write(out) == expected
    assert out.is_symlink() == ("link" in case)


def test_a_folder_with_content_or_a_file_is_an_error_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "full")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for out in ("full", "link", "file", "file/below", "loop"):
        with pytest.raises(ValueError, match=rf"--adapter .*{out}"), new_folder(tmp_path / out, option="--adapter"):
            raise AssertionError("not reached")
    assert (tmp_path / "full" / "file").read_text() == (tmp_path / "file").read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["file", "full", "link", "loop"]


def test_a_folder_that_gets_content_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(OSError), new_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("new")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "file").mkdir()
        (tmp_path / "out" / "file" / "mine").write_text("mine")
    assert (tmp_path / "out" / "file" / "mine").read_text() == "mine"


def test_the_disk_is_too_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(100 * 2**30, 98 * 2**30, 2 * 2**30))
    with pytest.raises(ValueError, match=r"--out .*out.* 3\.0 GiB.* 2\.0 GiB"):
        check_writable(tmp_path / "out", 3 * 2**30)
    check_writable(tmp_path / "out", 2 * 2**30)
    assert not list(tmp_path.iterdir()), "a check changes nothing"


def test_safetensors_on_a_full_disk_is_a_sentence(tmp_path: Path) -> None:
    program = f"""
import resource
from pathlib import Path
import test_output_folder
test_output_folder.save_large(Path({str(tmp_path)!r}) / "out")
"""
    variables = environment() | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    done = subprocess.run([sys.executable, "-c", program], env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())


def save_large(out: Path) -> None:
    """Write a file that is larger than the limit of this process."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # EFBIG; Python ignores SIGXFSZ
    with pytest.raises(ValueError, match=f"--out {out}"), new_folder(out) as folder:
        save_file({"weight": torch.zeros(1000)}, folder / "weights.safetensors")


@pytest.mark.skipif(os.geteuid() != 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_named() -> None:
    """/proc takes no folders, not even from root."""
    with pytest.raises(ValueError, match="--out /proc/none/out"), new_folder(Path("/proc/none/out")):
        raise AssertionError("not reached")


def test_a_folder_without_write_permission_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(dir: Path) -> None:
        raise PermissionError(13, "Permission denied", str(dir))

    monkeypatch.setattr(output_folder.tempfile, "TemporaryFile", denied)
    with pytest.raises(ValueError, match=r"--out .*out.*Permission denied"):
        check_writable(tmp_path / "out")


def can_mount() -> bool:
    command = ["unshare", "-m", "sh", "-c", "mount -t tmpfs tmpfs /mnt"]
    return shutil.which("unshare") is not None and subprocess.run(command, capture_output=True).returncode == 0


MOUNTED = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import test_output_folder
out = Path(sys.argv[1])
assert os.path.ismount(out)
print(test_output_folder.write(out))
"""


@pytest.mark.skipif(not can_mount(), reason="needs the right to mount (root)")
@pytest.mark.parametrize("kind", ["tmpfs", "bind"])
def test_an_empty_mount_point_is_filled(kind: str, tmp_path: Path) -> None:
    """A file system of its own; and a folder of the same file system, as a container's volume."""
    out, other = tmp_path / "out", tmp_path / "other"
    out.mkdir()
    other.mkdir()
    mount = {"tmpfs": f"mount -t tmpfs tmpfs {out}", "bind": f"mount --bind {other} {out}"}[kind]
    program = MOUNTED if kind == "tmpfs" else MOUNTED.replace("assert os.path.ismount(out)\n", "")
    script = f'{mount} && "$0" -c "$1" {out} {Path(__file__).parent}'
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script, sys.executable, program],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stdout == "['file', 'inner']\n", done.stderr


def test_fill_keeps_a_folder_that_cannot_be_replaced(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "file").write_text("new")
    (tmp_path / "out").mkdir()
    before = (tmp_path / "out").stat().st_ino
    fill(tmp_path / "out", tmp_path / "new")
    assert (tmp_path / "out").stat().st_ino == before and os.listdir(tmp_path) == ["out"]


def test_a_folder_is_made_where_a_link_points(tmp_path: Path) -> None:
    """`check_writable` accepts the link at the start, so that the work is not lost at the end."""
    link, real = tmp_path / "link", tmp_path / "disk" / "real"
    link.symlink_to(real)
    check_writable(link)
    make_folder(link / "inner")
    assert (real / "inner").is_dir()
    make_folder(link / "inner")
    (real / "file").touch()
    with pytest.raises(FileExistsError):
        make_folder(link / "file")


@pytest.mark.parametrize(
    "use",
    [
        OwnershipToken.claim,
        lambda out: MetricsLogger(out, total_steps=1).start(0),
        lambda out: PartialAnswers(out / "parts", {}),
        pipeline._check_folder,
        lambda out: locked(out / ".lock", "evaluation", "wait").__enter__(),
    ],
    ids=["checkpoints", "metrics", "evaluation", "preparation", "lock"],
)
def test_commands_create_their_folder_where_a_link_points(use: Callable[[Path], object], tmp_path: Path) -> None:
    link, real = tmp_path / "link", tmp_path / "disk" / "real"
    link.symlink_to(real)
    use(link)
    assert real.is_dir()
