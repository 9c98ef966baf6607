"""The command ``w2r2 export`` as a script; see w2r2_ds/commands/export.py."""

import sys

from w2r2_ds.commands.export import main

if __name__ == "__main__":
    sys.exit(main())
