"""The command ``w2r2 diagnose`` as a script; see w2r2_ds/commands/diagnose.py."""

import sys

from w2r2_ds.commands.diagnose import main

if __name__ == "__main__":
    sys.exit(main())
