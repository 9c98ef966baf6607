"""Tests of interpreted/ need TRITON_INTERPRET=1 before Triton is imported: test_interpreted.py runs them apart."""

from __future__ import annotations

import os

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]
