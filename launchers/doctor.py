"""The command ``w2r2 doctor`` as a script, which also runs where the package is not installed; see
w2r2_ds/commands/doctor.py.
"""

import faulthandler
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    faulthandler.enable()  # print the Python stack if a library crashes the process
    # Set before the package is imported and a recipe is read, because their file systems may hang. `examine` replaces
    # this time limit with its own.
    faulthandler.dump_traceback_later(120.0, exit=True)
    sys.path.append(str(Path(__file__).parents[1]))  # last: an installed package takes precedence
    from w2r2_ds.commands.doctor import main

    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # sys.exit could wait forever for a thread that is blocked in the kernel
