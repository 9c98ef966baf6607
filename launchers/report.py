"""The command ``w2r2 report`` as a script; see w2r2_ds/commands/report.py."""

import sys

from w2r2_ds.commands.report import main

if __name__ == "__main__":
    sys.exit(main())
