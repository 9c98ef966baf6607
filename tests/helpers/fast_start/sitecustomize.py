"""Imported by Python at the start of every child process of the tests (tests/helpers/fork_server.py sets the path).

Raises the threshold of the garbage collector. Imports create little garbage, but collections take 2 of their 9 s.
"""

import gc

gc.set_threshold(100_000)
