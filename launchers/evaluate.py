"""The command ``w2r2 evaluate`` as a script; see w2r2_ds/commands/evaluate.py."""

import sys

from w2r2_ds.commands.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
