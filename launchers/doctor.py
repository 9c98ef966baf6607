"""``w2r2 doctor``, also where the package is not installed: see w2r2_ds/commands/doctor.py."""

import faulthandler
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    faulthandler.enable()  # a library that crashes is named by the traceback
    # Before anything is imported or read: the file system of the package or of a recipe may not answer.
    faulthandler.dump_traceback_later(120.0, exit=True)
    sys.path.append(str(Path(__file__).parents[1]))
    from w2r2_ds.commands.doctor import main

    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # not sys.exit: a check that hangs in the kernel would hold the interpreter
