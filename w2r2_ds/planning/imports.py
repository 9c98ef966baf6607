"""Whether what is installed can be imported: tried in a process of its own, as a broken library may end or hang it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from pathlib import Path

from w2r2_ds.planning.bounded import work
from w2r2_ds.planning.outcome import Outcome

CHILD = Path(__file__).with_name("import_child.py")
MODULES = {
    "torch": "torch",
    "numpy": "numpy",
    "safetensors": "safetensors.torch",
    "pyyaml": "yaml",
    "jsonargparse": "jsonargparse",
    "pydantic": "pydantic",
    "psutil": "psutil",
    "rich": "rich",
    "pillow": "PIL.Image",
    "pyarrow": "pyarrow.parquet",
    "scipy": "scipy",
    "trimesh": "trimesh",
    "embreex": "embreex",
    "tokenizers": "tokenizers",
    "transformers": "transformers",
    "accelerate": "accelerate",
    "deepspeed": "deepspeed",
    "peft": "peft",
    "flash-attn": "flash_attn",
    "bitsandbytes": "bitsandbytes",
    "wandb": "wandb",
    "tensorboard": "tensorboard",
    "pycocoevalcap": "pycocoevalcap",
}
"""Package -> module that pulls in its compiled parts; torch first, which the doctor itself waits for."""


STILL = 4.0
"""Seconds without any work after which a child whose time is over is said to hang."""


class Imports:
    """Imports going on in a child process.

    Args:
        packages: those installed, names of ``MODULES``.
    """

    def __init__(self, packages: list[str]) -> None:
        self._names = {MODULES[name]: name for name in packages}
        self._errors: dict[str, str] = {}
        self._begun = ""
        self._said = threading.Condition()
        # -P: this file's folder must not come before the libraries.
        self._child = subprocess.Popen(
            [sys.executable, "-P", str(CHILD), *self._names],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._ended = False
        threading.Thread(target=self._listen, daemon=True).start()

    def usable(self, package: str, seconds: float) -> bool:
        """Whether one package was imported, as soon as it is known; not, where it takes longer than `seconds`."""
        with self._said:
            self._said.wait_for(lambda: self._ended or package in self._errors, seconds)
            return self._errors.get(package) == ""

    def result(self, seconds: float) -> Outcome:
        """What could not be imported; waits at most `seconds` for the rest."""
        with self._said:
            self._said.wait_for(lambda: self._ended, max(0.0, seconds - STILL))
            if not self._ended:
                before = work(str(self._child.pid))
                self._said.wait_for(lambda: self._ended, min(STILL, seconds))
            ended = self._ended
        works = not ended and work(str(self._child.pid)) != before
        if not ended:
            self._child.kill()
        code = self._child.wait()
        outcome = Outcome()
        outcome.wrong += [
            f"{name} is installed but cannot be imported ({error}); install it again, for this Python and this torch."
            for name, error in self._errors.items()
            if error
        ]
        what = f"importing {self._begun or 'the first library'}"
        if works:
            outcome.warnings.append(
                f"{what} is slow, and was not waited for; the environment may lie on a slow file system, or the "
                "machine be busy: copy the environment to a local disk."
            )
        elif not ended:
            outcome.wrong.append(
                f"{what} hangs; a lock or a file system may hold it: run python -X faulthandler -c 'import ...' on "
                "this node, and install the library again."
            )
        elif code:
            how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
            outcome.wrong.append(f"{what} ends the process ({how}); install it again, for this Python and this torch.")
        return outcome

    def _listen(self) -> None:
        assert self._child.stdout is not None, "a pipe was asked for"
        for line in self._child.stdout:
            module, error = json.loads(line)
            with self._said:
                if error is None:
                    self._begun = self._names[module]
                else:
                    self._errors[self._names[module]] = error
                self._said.notify_all()
        with self._said:
            self._ended = True
            self._said.notify_all()
