"""The command ``w2r2 ablate`` as a script; see w2r2_ds/commands/ablate.py."""

import sys

from w2r2_ds.commands.ablate import main

if __name__ == "__main__":
    sys.exit(main())
