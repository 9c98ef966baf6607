"""The command ``w2r2 prepare`` as a script; see w2r2_ds/commands/prepare.py."""

import sys

from w2r2_ds.commands.prepare import main

if __name__ == "__main__":
    sys.exit(main())
