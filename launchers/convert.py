"""The command ``w2r2 convert`` as a script; see w2r2_ds/commands/convert.py."""

import sys

from w2r2_ds.commands.convert import main

if __name__ == "__main__":
    sys.exit(main())
