"""Ignores interpreted/ unless TRITON_INTERPRET=1.

Triton reads the variable when it is imported, so test_interpreted.py runs these tests in a process of their own.
"""

from __future__ import annotations

import os

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]
