"""Stub of launchers/*.py for tests of the batch scripts: exits with a requested code, without training.

``--plan wait,9,0`` gives one action per launch of the job. A number is the exit code; 9 is death by SIGKILL. ``wait``
waits for SIGUSR1 or SIGTERM and exits with training's code for it. ``no-handler`` waits for a signal and is killed by
it, as evaluation is. Launches after the last action exit with 1. All ranks do the same.
"""

from __future__ import annotations

import os
import signal
import sys
import time

arguments = [part for word in sys.argv for part in word.split("=", 1)]
plan = arguments[arguments.index("--plan") + 1].split(",")
launch = int(os.environ.get("SLURM_RESTART_COUNT", 0))
action = plan[launch] if launch < len(plan) else "1"
print(f"launch {launch}: {action}", flush=True)
if action == "wait":
    signal.signal(signal.SIGUSR1, lambda *_: sys.exit(85))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    time.sleep(120)
    sys.exit(1)
if action == "no-handler":
    time.sleep(120)
if action == "9":
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(int(action))
