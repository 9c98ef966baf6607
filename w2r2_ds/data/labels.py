"""ScanNet's table of labels: what a raw category is called in NYU40."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

LABELS_FILE = "scannetv2-labels.combined.tsv"
LabelMap = Mapping[str, tuple[int, str]]
"""Raw category -> (nyu40id, nyu40class)."""

_COLUMNS = ("raw_category", "nyu40id", "nyu40class")
_SOURCE = "ScanNet's table of labels, which its own download script fetches"


def read_labels(root: Path | str) -> dict[str, tuple[int, str]]:
    """Read ``scannetv2-labels.combined.tsv`` below `root`. Of rows of the same raw category the last counts.

    ScanRefer's and Video-3D-LLM's readers keep the last, too.

    Raises:
        ValueError: the file is missing or not UTF-8, or lacks one of the three columns (in its header or in a row).
    """
    path = Path(root) / LABELS_FILE
    try:
        # No csv: quotes mean nothing in this file.
        content = path.read_bytes()
        lines = content.decode("utf-8").splitlines()
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; it must be {_SOURCE}") from None
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}: line {line} is not UTF-8 ({error}); it must be {_SOURCE}") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error}); it must be {_SOURCE}") from None
    header = lines[0].split("\t") if lines else []
    for column in _COLUMNS:
        if column not in header:
            raise ValueError(f"{path}: line 1 has no column {column!r}; it must be {_SOURCE}")
    places = [header.index(column) for column in _COLUMNS]
    labels = {}
    for line, row in enumerate(lines[1:], start=2):
        cells = row.split("\t")
        raw, number, name = (cells[place] if place < len(cells) else "" for place in places)
        for column, value in zip(_COLUMNS, (raw, number, name), strict=True):
            if not value.strip():
                raise ValueError(f"{path}: line {line}: field {column!r} is missing or empty; copy the file again")
        if not (number.isascii() and number.isdigit()):
            raise ValueError(f"{path}: line {line}: field 'nyu40id' is {number!r}, no number; copy the file again")
        labels[raw] = int(number), name
    if not labels:
        raise ValueError(f"{path} has a header, but no rows; it must be {_SOURCE}")
    return labels
