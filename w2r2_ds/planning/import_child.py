"""A program that imports the modules of its command line and says what came of each; standard library only."""

from __future__ import annotations

import importlib
import json
import os
import sys


def import_all(modules: list[str]) -> None:
    """Import modules; a line before each and one after it, ``[module, null]`` and ``[module, error]``."""
    lines = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries print what they like
    for module in modules:
        print(json.dumps([module, None]), file=lines)
        error = ""
        try:
            importlib.import_module(module)
        except BaseException as raised:  # the parent reports it, whatever it is
            error = f"{type(raised).__name__}: {' '.join(str(raised).split())[:300]}"
        print(json.dumps([module, error]), file=lines)
    lines.flush()
    os._exit(0)  # some libraries take seconds to leave


if __name__ == "__main__":
    import_all(sys.argv[1:])
