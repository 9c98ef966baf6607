"""``w2r2 evaluate``, for launchers that start a file: see w2r2_ds/commands/evaluate.py."""

import sys

from w2r2_ds.commands.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
