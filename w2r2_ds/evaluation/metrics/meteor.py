"""METEOR 1.5 and the PTB tokenizer: pycocoevalcap's Java programs, run with the same options as by pycocoevalcap.

What differs from its `Meteor` and `PTBTokenizer`: line breaks and ``|||`` in a text become blanks (they shift or break
all later texts there); the tokenizer reads stdin (there, a file in the package folder, which may be read-only); METEOR
ignores SIGUSR1 and SIGTERM, which ask a training run to stop after its step; errors of Java are raised as `JavaError`.
"""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

from pycocoevalcap.meteor import meteor as coco_meteor
from pycocoevalcap.tokenizer import ptbtokenizer as coco_tokenizer

LINE_BREAKS = re.compile("[\n\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029]")  # all that Java or Python end a line at
# The machine's language must not change scores: in Turkish, the lower case of "I" is not "i".
JAVA_OPTIONS = ("-Duser.language=en", "-Duser.country=US", "-Dfile.encoding=UTF-8")
IGNORE_SIGNALS = ("sh", "-c", 'trap "" USR1 TERM; exec "$@"', "sh")


class JavaError(RuntimeError):
    """Java is missing, or one of its programs failed."""


class Java(coco_meteor.Meteor):  # type: ignore[misc]
    """The tokenizer, and METEOR in a process that is started at the first use.

    Args:
        program: name or path of the ``java`` command.
    """

    def __init__(self, program: str = "java") -> None:
        self.program = program
        self.meteor_p: subprocess.Popen[bytes] | None = None

    def tokenize(self, texts: Sequence[str]) -> list[str]:
        """PTB tokens of each text, lower case, without COCO's punctuation, joined by blanks. Raises JavaError."""
        jar = Path(coco_tokenizer.__file__).absolute().with_name(coco_tokenizer.STANFORD_CORENLP_3_4_1_JAR)
        command = [self._path(), *JAVA_OPTIONS, "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer"]
        lines = "\n".join(LINE_BREAKS.sub(" ", text) for text in texts).encode(errors="replace")
        try:
            done = subprocess.run([*command, "-preserveLines", "-lowerCase"], input=lines, capture_output=True)
        except OSError as error:
            raise JavaError(f"{self.program} could not be started ({error}).") from error
        out = done.stdout.decode().split("\n")
        if done.returncode or len(out) != len(texts):
            raise JavaError(f"The PTB tokenizer failed: {_last_line(done.stderr)}.")
        dropped = coco_tokenizer.PUNCTUATIONS
        return [" ".join(word for word in line.rstrip().split(" ") if word not in dropped) for line in out]

    def meteor(self, references: Sequence[Sequence[str]], candidates: Sequence[str]) -> tuple[float, list[float]]:
        """METEOR 1.5 (English, normalised) of a corpus and of each of its items, in 0..1. Raises JavaError.

        The corpus score is not the mean of the items: the program sums the statistics of all items and scores the sum.
        """
        try:
            if self.meteor_p is None:
                self._start()
            return self.compute_score(dict(enumerate(references)), {i: [text] for i, text in enumerate(candidates)})
        except (OSError, ValueError) as error:  # the process ended, or printed something that is not a number
            raise JavaError(f"METEOR failed: {self.close() or error}.") from error

    def close(self) -> str:
        """Kill METEOR's process, if there is one; returns the last line of its standard error."""
        process, self.meteor_p = self.meteor_p, None
        if process is None:
            return ""
        process.kill()
        process.communicate()
        with self.errors:
            self.errors.seek(0)
            return _last_line(self.errors.read())

    def _start(self) -> None:
        self.lock = threading.Lock()  # a new one per process: `compute_score` does not release it on errors
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 (a full pipe that is not read would block the program)
        options = ("-Xmx2G", "-jar", coco_meteor.METEOR_JAR, "-", "-", "-stdio", "-l", "en", "-norm")
        command = [*IGNORE_SIGNALS, self._path(), *JAVA_OPTIONS, *options]
        folder = Path(coco_meteor.__file__).absolute().parent  # METEOR finds its paraphrase table there
        pipe = subprocess.PIPE
        self.meteor_p = subprocess.Popen(command, cwd=folder, stdin=pipe, stdout=pipe, stderr=self.errors)

    def _stat(self, candidate: str, references: Sequence[str]) -> str:
        """Statistics of one item, from METEOR's SCORE command; called by `compute_score`."""
        assert self.meteor_p is not None and self.meteor_p.stdin is not None and self.meteor_p.stdout is not None
        texts = [LINE_BREAKS.sub(" ", text).replace("|||", " ") for text in (*references, candidate)]
        line = " ||| ".join(["SCORE", *(re.sub("[ \t]+", " ", text) for text in texts)])
        self.meteor_p.stdin.write(line.encode(errors="replace") + b"\n")
        self.meteor_p.stdin.flush()
        answer = self.meteor_p.stdout.readline()
        if not answer.endswith(b"\n"):
            raise OSError("its process ended")
        return answer.decode().strip()

    def _path(self) -> str:
        path = shutil.which(self.program)
        if path is None:
            raise JavaError(
                f"METEOR and the PTB tokenizer need Java, and there is no command {self.program!r} on PATH "
                "(Debian: apt-get install default-jre-headless)."
            )
        return path

    def __del__(self) -> None:
        self.close()  # the base class's waits for the lock


shared_java = functools.cache(Java)
"""The instance of this process. METEOR takes 8 s and 1.2 GB to start, so it is started once; it ends with its stdin."""


def _last_line(errors: bytes) -> str:
    lines = errors.decode(errors="replace").strip().splitlines()
    return lines[-1].strip().rstrip(".") if lines else ""
