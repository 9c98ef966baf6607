"""What Python imports first in every child process of the tests, whose path has this folder
(tests/helpers/fork_server.py).

It looks for garbage more rarely: imports make little, and looking for it takes 2 of the 9 s of a rank's imports.
"""

import gc

gc.set_threshold(100_000)
