"""Replaces launchers/train.py in tests of the batch scripts: exits as requested, in milliseconds.

``--plan wait,9,0``: at the first start wait for a signal and end with the code that training ends with then, at the
second be killed by signal 9, at the third end well. ``deaf`` waits for a signal and dies of it, as evaluation does. A
plan that is over ends with 1. Every rank does the same.
"""

from __future__ import annotations

import os
import signal
import sys
import time

words = [part for word in sys.argv for part in word.split("=", 1)]
plan = words[words.index("--plan") + 1].split(",")
start = int(os.environ.get("SLURM_RESTART_COUNT", 0))
order = plan[start] if start < len(plan) else "1"
print(f"start {start}: {order}", flush=True)
if order == "wait":
    signal.signal(signal.SIGUSR1, lambda *_: sys.exit(85))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    time.sleep(120)
    sys.exit(1)
if order == "deaf":
    time.sleep(120)
if order == "9":
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(int(order))
