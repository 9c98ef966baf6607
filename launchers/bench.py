"""The command ``w2r2 bench`` as a script; see w2r2_ds/commands/bench.py."""

import sys

from w2r2_ds.commands.bench import main

if __name__ == "__main__":
    sys.exit(main())
