"""The restricted unpickler: arrays are restored, and names outside its table are neither imported nor called."""

from __future__ import annotations

import builtins
import os
import pickle
import struct
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from w2r2_ds.data.sources.numpy_unpickler import load_numpy_pickle

VALUES: dict[str, Any] = {
    "matrix": np.arange(16.0).reshape(4, 4),
    "columns": np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
    "turned": np.arange(24).reshape(2, 3, 4).transpose(1, 0, 2),
    "strided": np.arange(10)[::2],
    "big_endian": np.arange(3, dtype=">i4"),
    "empty": np.zeros((0, 3)),
    "flags": np.array([True, False]),
    "names": np.array(["ab", "c"]),
    "objects": np.array([1, "x", None], dtype=object),
    "float": np.float32(2.5),
    "integer": np.int64(-7),
    "string": np.str_("hey"),
    "nothing": np.str_(""),
    "bytes": b"\x00\xff",
    "no_bytes": b"",
    "set": {1, 2},
    "frozen": frozenset([3]),
    "ordered": OrderedDict(a=1),
    "nested": [({"a": [1.5, None, True]},)],
}


def written(folder: Path, content: bytes) -> Path:
    path = folder / "infos.pkl"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_arrays_and_containers_round_trip(tmp_path: Path, protocol: int) -> None:
    content = pickle.dumps(VALUES, protocol)
    read = load_numpy_pickle(written(tmp_path, content))
    stock = pickle.loads(content)
    assert list(read) == list(VALUES)
    for name, value in VALUES.items():
        if isinstance(value, np.ndarray):
            assert read[name].dtype == stock[name].dtype
            np.testing.assert_array_equal(np.asarray(read[name]), value)
            assert type(np.asarray(read[name])) is np.ndarray
        else:
            assert read[name] == value
            assert type(read[name]) is type(value)


def test_module_paths_of_numpy_1_and_2(tmp_path: Path) -> None:
    matrix = np.arange(4.0)
    for protocol in (4, 5):
        content = pickle.dumps([matrix, np.float64(3)], protocol)
        assert b"numpy._core.multiarray" in content or b"numpy._core.numeric" in content
        for name in ("multiarray", "numeric"):
            content = content.replace(short(f"numpy._core.{name}"), short(f"numpy.core.{name}"))
        # The names are one byte shorter, so the length in the FRAME opcode is wrong: remove the opcode.
        assert content[2:3] == b"\x95"
        read = load_numpy_pickle(written(tmp_path, content[:2] + content[11:]))
        np.testing.assert_array_equal(np.asarray(read[0]), matrix)
        assert read[1] == 3.0


MARK = "w2r2_ds_was_run"


class _Runs:
    """Object whose pickle calls a function."""

    def __init__(self, call: Any, *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call, self.arguments


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def short(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


def stack_global(module: str, name: str) -> bytes:
    """STACK_GLOBAL of protocol 4, which takes the names from the stack."""
    return b"\x80\x04" + short(module) + short(name) + b"\x93"


RUN = f"import builtins; builtins.{MARK} = True"
PAYLOADS = {
    "os.system": (pickle.dumps(_Runs(os.system, "exit 0"), 2), r"(posix|nt)\.system"),
    "eval": (pickle.dumps(_Runs(eval, "1"), 4), r"builtins\.eval"),
    "exec": (pickle.dumps([1, _Runs(exec, RUN)], 5), r"builtins\.exec"),
    "numpy.load": (pickle.dumps(_Runs(np.load, "x.npy", None, True), 4), r"numpy\.load"),
    "getattr": (pickle.dumps(_Runs(getattr, "x", "upper"), 4), r"builtins\.getattr"),
    "GLOBAL": (f"cbuiltins\nexec\n(V{RUN}\ntR.".encode(), r"builtins\.exec"),
    "INST": (f"(V{RUN}\nibuiltins\nexec\n.".encode(), r"builtins\.exec"),
    "OBJ": (b"(cbuiltins\nexec\n" + text(RUN) + b"o.", r"builtins\.exec"),
    "dotted": (stack_global("builtins", "exec.__call__") + text(RUN) + b"\x85R.", r"builtins\.exec\.__call__"),
    "dotted numpy": (stack_global("numpy", "testing._private.utils.runstring") + b")R.", r"numpy\.testing\._private"),
    "dotted dtype": (stack_global("numpy", "dtype.__class__") + b")R.", r"numpy\.dtype\.__class__"),
    "module as name": (
        stack_global("numpy.testing", "runstring") + text(RUN) + b"}\x86R.",
        r"numpy\.testing\.runstring",
    ),
    "import": (stack_global("numpy.core.multiarray", "__import__") + b".", r"numpy\.core\.multiarray\.__import__"),
    "own table": (
        stack_global("w2r2_ds.data.sources.numpy_unpickler", "_ALLOWED") + b".",
        r"w2r2_ds\.data\.sources\.numpy_unpickler\._ALLOWED",
    ),
    "copyreg": (stack_global("copyreg", "__newobj__") + b".", r"copyreg\.__newobj__"),
    "partial": (stack_global("functools", "partial") + b".", r"functools\.partial"),
    "defaultdict": (stack_global("collections", "defaultdict") + b".", r"collections\.defaultdict"),
    "object": (stack_global("builtins", "object") + b")\x81.", r"builtins\.object"),
    "python 2": (b"c__builtin__\neval\n(V1\ntR.", r"__builtin__\.eval"),
    "numpy.memmap": (stack_global("numpy", "memmap") + text("/etc/passwd") + b"\x85R.", r"numpy\.memmap"),
    "numpy.fromfile": (stack_global("numpy.core.multiarray", "fromfile") + b".", r"numpy\.core\.multiarray\.fromfile"),
}


@pytest.mark.parametrize("name", PAYLOADS)
def test_a_named_callable_is_rejected_and_not_run(tmp_path: Path, name: str) -> None:
    content, named = PAYLOADS[name]
    path = written(tmp_path, content)
    before = set(sys.modules)
    with pytest.raises(ValueError, match=rf"infos\.pkl names {named}"):
        load_numpy_pickle(path)
    assert not hasattr(builtins, MARK)
    assert set(sys.modules) == before


def test_pickle_load_runs_the_payloads(tmp_path: Path) -> None:
    """Control of the test above."""
    ran = []
    for name in ("exec", "GLOBAL", "INST", "OBJ", "dotted"):
        try:
            pickle.loads(PAYLOADS[name][0])
            ran.append(hasattr(builtins, MARK))
        finally:
            if hasattr(builtins, MARK):
                delattr(builtins, MARK)
    assert ran == [True] * 5


BROKEN = {
    "a codec that runs": stack_global("_codecs", "encode") + short("a") + short("zip") + b"\x86R.",
    "array of another class": stack_global("numpy.core.multiarray", "_reconstruct")
    + stack_global("builtins", "set")[2:]
    + b"K\x00\x85C\x01b\x87R.",
    "persistent id": b"\x80\x04K\x01Q.",
    "extension": b"\x80\x04\x82\x01.",
    "out of band": b"\x80\x05\x97.",
    "memo": b"\x80\x04h\x09.",
    "mark": b"\x80\x04t.",
    "protocol": b"\x80\x7f.",
    "text": b'{"metainfo": {}}',
    "zip": b"PK\x03\x04" + bytes(40),
}


@pytest.mark.parametrize("name", BROKEN)
def test_other_streams_are_rejected(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"infos\.pkl .*an infos file"):
        load_numpy_pickle(written(tmp_path, BROKEN[name]), "an infos file")


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_every_truncation_gives_one_line(tmp_path: Path, protocol: int) -> None:
    # Without the array of objects, which NumPy fills before it detects that its list is too short.
    content = pickle.dumps({name: value for name, value in VALUES.items() if name != "objects"}, protocol)
    for length in range(0, len(content), 7):
        with pytest.raises(ValueError, match=r"infos\.pkl is ") as caught:
            load_numpy_pickle(written(tmp_path, content[:length]))
        assert "\n" not in str(caught.value)


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.pkl does not exist; it must be EmbodiedScan's"):
        load_numpy_pickle(tmp_path / "none.pkl", "EmbodiedScan's")
    with pytest.raises(ValueError, match="cannot be read"):
        load_numpy_pickle(tmp_path)
