"""Whether libraries can be imported: tried in a fork of this process, as a broken one may end or hang whoever tries."""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import signal
import threading
import time
import warnings
from importlib.metadata import PackageNotFoundError, version

from w2r2_ds.doctor.result import CheckResult
from w2r2_ds.doctor.timeouts import STILL, work

MODULES = {
    "numpy": "numpy",
    "safetensors": "safetensors.torch",
    "pyyaml": "yaml",
    "pydantic": "pydantic",
    "psutil": "psutil",
    "rich": "rich",
    "pillow": "PIL.Image",
    "pyarrow": "pyarrow.parquet",
    "scipy": "scipy",
    "embreex": "embreex",
    "tokenizers": "tokenizers",
    "flash-attn": "flash_attn",
    "bitsandbytes": "bitsandbytes",
    "transformers": "transformers",
    "deepspeed": "deepspeed",
}
"""Package -> module, of what has compiled parts or refuses its neighbours' versions; the rest is plain Python."""

REAPED = 1.0
"""Seconds in which a killed child leaves; one that is stuck in the kernel does not."""

ORPHANED = 120
"""Seconds after which a child ends by itself: longer than any doctor works, one whose parent was killed may hang."""


class Imports:
    """Imports going on in a child, which has what this process has imported (torch) already.

    Args:
        packages: names of ``MODULES``.
    """

    def __init__(self, packages: list[str]) -> None:
        self._errors: dict[str, str] = {}
        self._begun = "the first library"
        self._ended = threading.Event()
        reading, writing = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forks with threads: the alarm's holds no lock
            self._pid = os.fork()
        if self._pid == 0:
            os.close(reading)
            import_all(packages, writing)
        os.close(writing)
        threading.Thread(target=self._listen, args=(reading,), daemon=True).start()

    def result(self, seconds: float) -> CheckResult:
        """What could not be imported; waits at most `seconds` for the rest."""
        late = works = False
        if not self._ended.wait(max(0.0, seconds - STILL)):
            before = work(str(self._pid))
            late = not self._ended.wait(STILL)
            works = work(str(self._pid)) != before
        if late:
            os.kill(self._pid, signal.SIGKILL)
        status = self._reap()
        outcome = CheckResult()
        outcome.wrong += [
            f"{name} is installed but cannot be imported ({error}); install it again, for this Python and this torch."
            for name, error in self._errors.items()
            if error
        ]
        what = f"importing {self._begun}"
        if late and works:
            outcome.warnings.append(
                f"{what} is slow, and was not waited for; the environment may lie on a slow file system, or the "
                "machine be busy: copy the environment to a local disk."
            )
        elif late:
            outcome.wrong.append(
                f"{what} hangs; a lock or a file system may hold it: import it by hand on this node, and install it "
                "again."
            )
        elif status:
            how = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
            outcome.wrong.append(f"{what} ends the process ({how}); install it again, for this Python and this torch.")
        return outcome

    def _reap(self) -> int:
        """The child's exit status, negative for a signal; 0 for one that does not leave."""
        end = time.monotonic() + REAPED
        while time.monotonic() < end:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.01)
        return 0

    def _listen(self, reading: int) -> None:
        with os.fdopen(reading) as lines:
            for line in lines:
                name, error = json.loads(line)
                if error is None:
                    self._begun = name
                else:
                    self._errors[name] = error
        self._ended.set()


def installed_modules() -> list[str]:
    """Packages of ``MODULES`` that are installed."""
    found = []
    for name in MODULES:
        try:
            version(name)
        except PackageNotFoundError:
            continue
        found.append(name)
    return found


def import_all(packages: list[str], writing: int) -> None:
    """Import, and write a line before each, ``[name, null]``, and one after it, ``[name, error]``; never returns."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(ORPHANED)  # of the system: it needs no thread that still runs
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 1)  # libraries print what they like
    os.dup2(nowhere, 2)
    faulthandler.disable()  # the parent tells of a crash
    for name in packages:
        os.write(writing, json.dumps([name, None]).encode() + b"\n")
        error = ""
        try:
            importlib.import_module(MODULES[name])
        except BaseException as raised:  # the parent reports it, whatever it is
            error = f"{type(raised).__name__}: {' '.join(str(raised).split())[:300]}"
        os.write(writing, json.dumps([name, error]).encode() + b"\n")
    os._exit(0)
