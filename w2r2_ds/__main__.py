"""``python -m w2r2_ds COMMAND ...``, the same as ``w2r2 COMMAND ...``."""

import sys

from w2r2_ds.commands import main

if __name__ == "__main__":
    sys.exit(main())
