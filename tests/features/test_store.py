"""The feature store: complete files or none, also with concurrent, killed or failing writers and damaged files."""

from __future__ import annotations

import logging
import os
import resource
import shutil
import signal
import stat
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from w2r2_ds.features import lookup
from w2r2_ds.features.key import encoder_identity, features_key
from w2r2_ds.features.lookup import CacheLookup, flush_writes
from w2r2_ds.features.store import ABANDONED, HEADER, FeatureStore, file_size

BIG = 10**9
SEVEN = torch.full((500, 1000), 7.0)
"""Features of 2 MB."""


def fork_writer(cache: FeatureStore, number: int, times: int) -> int:
    """Fork a process that writes `SEVEN` repeatedly, removing the file each time; returns its id."""
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        for _ in range(times):
            cache.path(key(number)).unlink(missing_ok=True)
            assert cache.write(key(number), SEVEN, {})
        status = 0
    finally:
        os._exit(status)


def key(number: int) -> str:
    return f"{number:064x}"


def features(
    number: float, dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (4, 30, 20, 8)
) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(int(number))).to(dtype)


@pytest.fixture
def cache(tmp_path: Path) -> FeatureStore:
    return FeatureStore(tmp_path / "cache", BIG)


def there(cache: FeatureStore, numbers: range) -> list[int]:
    return [number for number in numbers if cache.path(key(number)).exists()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_features_are_restored_bitwise(cache: FeatureStore, dtype: torch.dtype) -> None:
    """With NaN, infinity and negative zero, and for a slice of a larger tensor."""
    whole = features(1, dtype)
    whole[0, 0, 0, :3] = torch.tensor([torch.nan, -0.0, torch.inf])
    assert cache.read(key(1)) is None
    assert cache.write(key(1), whole[:, 1:], {"frames": ["größer"]})
    read = cache.read(key(1))
    assert read is not None and read.dtype == dtype and read.shape == (4, 29, 20, 8)
    assert torch.equal(read.contiguous().view(torch.uint8), whole[:, 1:].contiguous().view(torch.uint8))
    size = cache.path(key(1)).stat().st_size
    assert size <= file_size((4, 29, 20, 8), dtype) <= size + HEADER
    assert cache.size() == size


def test_a_read_maps_the_file_and_copies_nothing(cache: FeatureStore) -> None:
    cache.write(key(1), features(1), {})
    read = cache.read(key(1))
    assert read is not None
    place = read.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(each, 16) for each in line.split()[0].split("-"))
        if begin <= place < end:
            assert line.endswith(str(cache.path(key(1)))), line
            return
    raise AssertionError("the tensor is in no mapping")


def test_files_have_the_mode_of_the_umask(cache: FeatureStore) -> None:
    mask = os.umask(0o027)
    try:
        cache.write(key(1), features(1), {})
    finally:
        os.umask(mask)
    assert stat.S_IMODE(cache.path(key(1)).stat().st_mode) == 0o640


def test_concurrent_writers_of_one_key(cache: FeatureStore) -> None:
    """Readers meanwhile get the complete features or None; no temporary file remains."""
    alive, seen = {fork_writer(cache, 5, 20) for _ in range(2)}, 0
    while alive:
        read = cache.read(key(5))
        seen += read is not None
        assert read is None or torch.equal(read, SEVEN)
        for process in sorted(alive):
            ended, status = os.waitpid(process, os.WNOHANG)
            assert status == 0
            alive.discard(ended)
    assert seen and [path.name for path in cache.folder.rglob("*.*")] == [f"{key(5)}.safetensors"]


def test_a_killed_writer_leaves_no_partial_file(cache: FeatureStore, caplog: pytest.LogCaptureFixture) -> None:
    """Killed at any moment: the file is complete or missing, and its temporary file is removed after an hour."""
    for pause in range(12):
        process = fork_writer(cache, 6, 10**6)
        time.sleep(0.02 + 0.003 * pause)
        os.kill(process, signal.SIGKILL)
        assert os.waitpid(process, 0)[1] == signal.SIGKILL
        read = cache.read(key(6))
        assert read is None or torch.equal(read, SEVEN)
    assert not caplog.records  # nothing was damaged
    assert list(cache.folder.rglob("*.partial"))  # at least one was killed while it was writing
    left = cache.path(key(7)).with_suffix(".safetensors.0123abcd.partial")
    left.write_bytes(b"half")
    cache.size()
    assert left.exists()
    then = time.time() - ABANDONED - 1
    os.utime(left, (then, then))
    cache.size()
    assert not left.exists()


@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped", "flipped shape", "another key", "no safetensors"])
def test_a_damaged_file_is_logged_and_written_again(
    cache: FeatureStore, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    kept = features(1, torch.bfloat16)
    cache.write(key(1), kept, {})
    cache.write(key(2), features(2, torch.bfloat16), {})
    path, content = cache.path(key(1)), bytearray(cache.path(key(1)).read_bytes())
    if damage == "flipped":
        content[-7] ^= 16
    changed = {
        "truncated": content[:-100],
        "empty": b"",
        "flipped": content,
        "flipped shape": content.replace(b"[4,30,20,8]", b"[4,30,8,20]"),
        "another key": cache.path(key(2)).read_bytes(),
        "no safetensors": b"x" * 500,
    }[damage]
    path.write_bytes(changed)
    assert cache.read(key(1)) is None
    assert cache.read(key(1)) is None
    (warning,) = [each.getMessage() for each in caplog.records]
    assert warning.startswith(f"{path} is damaged (")
    assert cache.write(key(1), kept, {})
    again = cache.read(key(1))
    assert again is not None and torch.equal(again, kept)


def test_the_checksum_detects_every_flipped_bit(cache: FeatureStore) -> None:
    kept = features(1, shape=(1, 1, 2, 2))
    cache.write(key(1), kept, {})
    content = cache.path(key(1)).read_bytes()
    begin = len(content) - 16
    for bit in range(8 * 16):
        changed = bytearray(content)
        changed[begin + bit // 8] ^= 1 << bit % 8
        cache.path(key(1)).write_bytes(changed)
        assert cache.read(key(1)) is None, bit


def test_reading_changes_nothing(cache: FeatureStore) -> None:
    cache.write(key(1), features(1), {})
    before = cache.path(key(1)).stat(), cache.path(key(1)).read_bytes()
    cache.read(key(1))
    after = cache.path(key(1)).stat(), cache.path(key(1)).read_bytes()
    assert before[1] == after[1]
    assert (before[0].st_ino, before[0].st_mtime_ns) == (after[0].st_ino, after[0].st_mtime_ns)


def test_a_full_store_accepts_no_more_files_and_is_still_read(cache: FeatureStore) -> None:
    """Also if a single file exceeds the limit. Nothing is evicted, and no temporary file remains."""
    one = file_size((4, 30, 20, 8), torch.float32)
    small = FeatureStore(cache.folder, 3 * one)
    written = [small.write(key(number), features(number), {}) for number in range(6)]
    assert written[:2] == [True, True] and not written[-1]
    assert there(small, range(6)) == [number for number in range(6) if written[number]]
    assert small.size() <= small.limit
    assert small.write(key(0), features(0), {}), "it is there"
    read = small.read(key(1))
    assert read is not None and torch.equal(read, features(1))
    assert not FeatureStore(cache.folder, one - 1).write(key(9), features(9, shape=(500, 100)), {})
    assert not list(cache.folder.rglob("*.partial"))


def test_a_full_store_is_logged_once(
    cache: FeatureStore, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lookup, "_warned", set())
    small = FeatureStore(cache.folder, 10)
    for number in range(3):
        CacheLookup(small, key(number), {}, None).write_async(features(number))
    flush_writes()
    (warning,) = [each.getMessage() for each in caplog.records]
    assert str(cache.folder) in warning and "data.cache_gib" in warning


def test_only_files_of_the_store_are_counted(cache: FeatureStore) -> None:
    """The folder may contain other files."""
    cache.write(key(1), features(1), {})
    size = cache.size()
    for path in (
        cache.folder / "00" / "notes.safetensors",
        cache.folder / "notes.txt",
        cache.folder / "00" / "x.partial",
    ):
        path.write_bytes(b"x" * 10_000)
        os.utime(path, (1, 1))
    assert cache.size() == size
    assert FeatureStore(cache.folder, 2 * size + HEADER).write(key(2), features(2), {})
    assert len(list(cache.folder.rglob("*.*"))) == 5


def test_a_full_disk_raises_and_leaves_no_file(cache: FeatureStore) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            cache.write(key(1), features(1), {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert cache.size() == 0 and not list(cache.folder.rglob("*.*"))


def test_a_read_only_store_is_read_and_a_failed_write_logged(
    cache: FeatureStore, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The write error is injected, because root may write everywhere."""

    def fail(*args: Any, **keywords: Any) -> None:
        raise PermissionError(13, "Permission denied")

    cache.write(key(1), features(1), {})
    read = cache.read(key(1))
    assert read is not None and torch.equal(read, features(1))
    monkeypatch.setattr(Path, "write_bytes", fail)
    monkeypatch.setattr(lookup, "_warned", set())
    for number in (2, 3):
        CacheLookup(cache, key(number), {}, None).write_async(features(number))
    flush_writes()
    (warning,) = [each.getMessage() for each in caplog.records]
    assert str(cache.folder) in warning and "cannot be written (Permission denied)" in warning


def test_files_without_read_permission_are_logged(tmp_path: Path) -> None:
    """A file and a folder without permission, read by a process that is not root's."""
    cache, said, secret = FeatureStore(tmp_path / "cache", BIG), tmp_path / "said", key(2**255)
    for number in (1, 2**255):
        cache.write(key(number), features(1), {})
    cache.path(key(1)).chmod(0)
    cache.path(secret).parent.chmod(0)
    process = os.fork()
    if not process:
        status = 1
        try:
            with said.open("w") as output:
                logging.getLogger("w2r2_ds.features").handlers = [logging.StreamHandler(output)]
                os.chdir(cache.folder)  # the other user cannot search the folders above
                if os.geteuid() == 0:
                    os.setuid(65534)
                here = FeatureStore(Path(), BIG)
                assert all(here.read(each) is None for each in (key(1), secret, key(3)))
                assert not here.has(secret) and not CacheLookup(here, secret, {}, None).is_outdated()
                status = 0
        finally:
            os._exit(status)
    ended = os.waitpid(process, 0)[1]
    cache.path(secret).parent.chmod(0o700)
    lines = said.read_text().splitlines()
    assert ended == 0 and len(lines) == 2, lines
    assert all("cannot be read (Permission denied)" in line for line in lines)


def test_an_unexpected_error_while_writing_is_raised(cache: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> bool:
        raise RuntimeError("a mistake")

    monkeypatch.setattr(FeatureStore, "write", fail)
    CacheLookup(cache, key(1), {}, None).write_async(features(1))
    with pytest.raises(RuntimeError, match="a mistake"):
        flush_writes()


def test_a_key_depends_on_content_order_and_encoder(samples: list[Any], tmp_path: Path) -> None:
    frames = list(samples[0].frames)
    about = {"kind": "geometry", "weights": "abc", "layer": 3, "dtype": "torch.float32"}
    own = features_key(encoder_identity(about), frames)
    assert len(own) == 64
    assert features_key(encoder_identity(about), frames) == own
    assert features_key(encoder_identity(about), [*frames[1:], frames[0]]) != own
    assert features_key(encoder_identity(about), frames[:-1]) != own
    for field in about:
        assert features_key(encoder_identity(about | {field: "other"}), frames) != own
    moved = [Path(shutil.copy(path, tmp_path / f"elsewhere-{index}")) for index, path in enumerate(frames)]
    assert features_key(encoder_identity(about), moved) == own
    # Other content with the size and date of before, as rsync and tar may leave it.
    before = moved[0].stat()
    content = bytearray(moved[0].read_bytes())
    content[-20] ^= 1
    moved[0].write_bytes(content)
    os.utime(moved[0], ns=(before.st_atime_ns, before.st_mtime_ns))
    assert moved[0].stat().st_size == before.st_size and moved[0].stat().st_mtime_ns == before.st_mtime_ns
    assert features_key(encoder_identity(about), moved) != own
    with pytest.raises(ValueError, match=r"Frame .*gone cannot be read \(No such file"):
        features_key("x", [tmp_path / "gone"])


def test_the_header_describes_the_features(cache: FeatureStore) -> None:
    cache.write(key(1), features(1), {"kind": "geometry", "frames": ["a.jpg"]})
    with safe_open(cache.path(key(1)), framework="pt") as file:
        about = file.metadata()
    assert about["about"] == '{"kind": "geometry", "frames": ["a.jpg"]}' and about["key"] == key(1)
