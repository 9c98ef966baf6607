"""Pickles of strangers, without their code: NumPy arrays, numbers and plain containers, nothing else.

A pickle is a program: it names functions, and reading it calls them. Here a name is looked up in a closed table and
never imported. What stands in the table are this module's own readers, which check shapes, types and lengths before
NumPy sees them (NumPy's own `__setstate__` methods trust what they get), and which a pickle cannot alter.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from w2r2_ds.utils.sanitize import one_line


def load_plain(path: Path | str, what: str = "a pickle of NumPy arrays and plain containers") -> Any:
    """What a pickle holds. Arrays may come as a private subclass of ``ndarray``; `numpy.asarray` makes them plain.

    Args:
        path: the file, of any pickle protocol.
        what: what the file is, and where one gets it.

    Raises:
        ValueError: no such file, no pickle, truncated, or it names anything but NumPy's arrays, scalars and types,
            ``set``, ``frozenset``, ``complex`` and ``OrderedDict`` (nothing of it is run).
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            return _Plain(file).load()
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; it must be {what}") from None
    except _Refused as error:
        raise ValueError(
            f"{path} names {error}, which is neither NumPy's nor a plain container; nothing of it was run: "
            "do not load this file elsewhere, and get it again from its source"
        ) from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); it must be {what}") from None
    except EOFError:
        raise ValueError(f"{path} is empty or truncated; copy it again, it must be {what}") from None
    except Exception as error:  # whatever a broken stream makes the interpreter of pickles stumble over
        said = one_line(" ".join(str(error).split()))
        if "truncated" in said or "exhausted" in said:
            raise ValueError(f"{path} is truncated; copy it again, it must be {what}") from None
        raise ValueError(f"{path} is no readable pickle ({said}); it must be {what}") from None


class _Refused(pickle.UnpicklingError):
    """A name that is not in the table."""


class _Plain(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _TABLE[module, name]
        except KeyError:
            raise _Refused(one_line(f"{module}.{name}")) from None


class _Call:
    """A function without attributes, so that a pickle's BUILD cannot change it."""

    __slots__ = ("_function",)
    _function: Callable[..., Any]

    def __init__(self, function: Callable[..., Any]) -> None:
        object.__setattr__(self, "_function", function)

    def __setattr__(self, name: str, value: Any) -> None:
        raise pickle.UnpicklingError("it tries to alter a reader")

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)


_KINDS = "biufcSUO"


class _Type:
    """Stands for a ``numpy.dtype`` while reading: one of the simple kinds, with a byte order."""

    __slots__ = ("real",)

    def __init__(self, text: str) -> None:
        real = np.dtype(text) if isinstance(text, str) and "," not in text else None
        if real is None or real.kind not in _KINDS or real.subdtype is not None:
            raise pickle.UnpicklingError(f"it has numbers of type {text!r}")
        self.real = real

    def __setstate__(self, state: Any) -> None:
        # (version, byte order, subarray, field names, fields, size, alignment, flags); sizes are in the type's text
        if not isinstance(state, tuple) or len(state) < 5 or any(part is not None for part in state[2:5]):
            raise pickle.UnpicklingError("it has structured numbers")
        if state[1] in ("<", ">"):
            self.real = self.real.newbyteorder(state[1])


def _real(given: Any) -> np.dtype[Any]:
    if not isinstance(given, _Type):
        raise pickle.UnpicklingError("an array has no type")
    return given.real


def _shape(given: Any) -> tuple[int, ...]:
    if not isinstance(given, tuple) or not all(type(side) is int and side >= 0 for side in given):
        raise pickle.UnpicklingError("an array's shape is no tuple of sizes")
    return given


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for side in shape:
        count *= side
    return count


class _Array(np.ndarray):
    """An array that is made empty and filled by a checked `__setstate__`, as pickles of protocol 2 to 4 do."""

    def __setstate__(self, state: Any) -> None:  # type: ignore[override]
        _, shape, given, fortran, data = state
        shape, real = _shape(shape), _real(given)
        count = _count(shape)
        wanted = list if real.kind == "O" else bytes
        if type(data) is not wanted or len(data) != (count if real.kind == "O" else count * real.itemsize):
            raise pickle.UnpicklingError(f"an array of {shape} has other data")
        super().__setstate__((1, shape, real, bool(fortran), data))  # type: ignore[arg-type]


def _type(text: Any, align: Any = False, copy: Any = False) -> _Type:
    return _Type(text)


def _reconstruct(kind: Any, shape: Any, letter: Any) -> _Array:
    """NumPy's maker of arrays to be filled; what it is told about their size is of no consequence."""
    if kind is not _NDARRAY:
        raise pickle.UnpicklingError("an array of an unknown class")
    return np.ndarray.__new__(_Array, (0,), np.int8)


def _frombuffer(data: Any, given: Any, shape: Any, order: Any, axes: Any = None) -> np.ndarray:
    """An array of protocol 5: raw bytes; `axes` since NumPy 2.3, for arrays that are contiguous in another order."""
    real, shape = _real(given), _shape(shape)
    if real.kind == "O" or not isinstance(data, (bytes, bytearray)) or len(data) != _count(shape) * real.itemsize:
        raise pickle.UnpicklingError(f"an array of {shape} has other data")
    flat = np.frombuffer(data, real) if data else np.empty(0, real)
    if axes is not None:
        return flat.reshape(shape).transpose(axes)
    return flat.reshape(shape, order="F" if order == "F" else "C")


def _scalar(given: Any, data: Any = b"") -> Any:
    real = _real(given)
    if real.kind == "O" or not isinstance(data, bytes) or len(data) != real.itemsize:
        raise pickle.UnpicklingError("a NumPy number has other data")
    return np.frombuffer(data, real)[0] if data else real.type()


def _bytes(text: Any, coding: Any = None) -> bytes:
    """How protocol 2 writes bytes: as text, with the codec that undoes it."""
    if coding != "latin1" or not isinstance(text, str):
        raise pickle.UnpicklingError(f"bytes in the coding {coding!r}")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    """How protocol 2 writes bytes that are none."""
    return b""


_NDARRAY = "numpy.ndarray"
"""Not the class: it is only an argument of `_reconstruct`, and calling or filling a string fails."""

_TABLE: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _NDARRAY,
    ("numpy", "dtype"): _Call(_type),
    ("_codecs", "encode"): _Call(_bytes),
    ("collections", "OrderedDict"): OrderedDict,
}
for _core in ("numpy.core", "numpy._core"):
    _TABLE[f"{_core}.multiarray", "_reconstruct"] = _Call(_reconstruct)
    _TABLE[f"{_core}.multiarray", "scalar"] = _Call(_scalar)
    _TABLE[f"{_core}.numeric", "_frombuffer"] = _Call(_frombuffer)
for _builtins in ("builtins", "__builtin__"):
    _TABLE[_builtins, "bytes"] = _Call(_no_bytes)
    for _class in (set, frozenset, complex):
        _TABLE[_builtins, _class.__name__] = _class
