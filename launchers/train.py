"""The command ``w2r2 train`` as a script; see w2r2_ds/commands/train.py."""

import sys

from w2r2_ds.commands.train import main

if __name__ == "__main__":
    sys.exit(main())
