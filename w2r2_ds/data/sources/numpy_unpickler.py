"""Restricted unpickler: NumPy arrays, numbers and builtin containers; any other class in a pickle raises ValueError.

A pickle can import and call any function. `pickle.Unpickler.find_class` is the documented method to restrict this: here
it resolves only the names in a table. Any other name raises an error before it is imported or called.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from w2r2_ds.utils.sanitize import one_line

# The functions that NumPy writes into pickles to rebuild an array, a scalar, and an array in protocol 5. They are taken
# from `__reduce__`, because their modules are private and differ between NumPy versions.
_array = np.zeros(1)
_RECONSTRUCT, _SCALAR, _FROMBUFFER = _array.__reduce__()[0], _array[0].__reduce__()[0], _array.__reduce_ex__(5)[0]


def _bytes(text: str = "", coding: str = "latin1") -> bytes:
    """Replacement of ``_codecs.encode`` and ``bytes``, which pickles of protocol 2 call to rebuild bytes.

    These pickles write bytes as latin1 text; other codecs are not supported.
    """
    if coding != "latin1":
        raise pickle.UnpicklingError(f"bytes in the coding {coding!r}")
    return text.encode("latin1")


_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _bytes,
    ("collections", "OrderedDict"): OrderedDict,
}
for _core in ("numpy.core", "numpy._core"):  # NumPy 1 and 2
    _ALLOWED[f"{_core}.multiarray", "_reconstruct"] = _RECONSTRUCT
    _ALLOWED[f"{_core}.multiarray", "scalar"] = _SCALAR
    _ALLOWED[f"{_core}.numeric", "_frombuffer"] = _FROMBUFFER
for _builtins in ("builtins", "__builtin__"):
    _ALLOWED |= {(_builtins, each.__name__): each for each in (set, frozenset, complex)}
    _ALLOWED[_builtins, "bytes"] = _bytes


class _NotAllowed(pickle.UnpicklingError):
    """The pickle contains a name that is not in the table."""


class _RestrictedUnpickler(pickle.Unpickler):
    """Unpickler that resolves the names in ``_ALLOWED`` only."""

    def find_class(self, module: str, name: str) -> Any:
        # Called for every global name in a pickle, before it is used. Not super().find_class, which imports `module`
        # and follows dotted names.
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise _NotAllowed(one_line(f"{module}.{name}")) from None


def load_numpy_pickle(path: Path | str, expected: str = "a pickle of NumPy arrays and builtin containers") -> Any:
    """Load a pickle of NumPy arrays, scalars and builtin containers, of any protocol.

    Args:
        path: pickle file.
        expected: description of the expected file and its source, for messages.

    Raises:
        ValueError: the file is missing, truncated or not a pickle, or it contains any other class or function.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            return _RestrictedUnpickler(file).load()
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; it must be {expected}") from None
    except _NotAllowed as error:
        raise ValueError(
            f"{path} names {error}, which is neither NumPy's nor a builtin container; nothing of it was run: "
            "do not load this file elsewhere, and get it again from its source"
        ) from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); it must be {expected}") from None
    except Exception as error:  # a damaged stream may raise any exception
        cause = one_line(" ".join(str(error).split())) or type(error).__name__
        raise ValueError(f"{path} is truncated or not a pickle ({cause}); it must be {expected}") from None
