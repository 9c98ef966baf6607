"""The command ``w2r2 demo`` as a script; see w2r2_ds/commands/demo.py."""

import sys

from w2r2_ds.commands.demo import main

if __name__ == "__main__":
    sys.exit(main())
