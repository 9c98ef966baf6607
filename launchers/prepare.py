"""``w2r2 prepare``, for launchers that start a file: see w2r2_ds/commands/prepare.py."""

import sys

from w2r2_ds.commands.prepare import main

if __name__ == "__main__":
    sys.exit(main())
