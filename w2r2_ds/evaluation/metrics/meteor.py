"""METEOR 1.5 and the PTB tokenizer: pycocoevalcap's Java programs, run with the same options as by pycocoevalcap.

Differences: line breaks and ``|||`` in a text become spaces, because they would shift or break all later texts; the
tokenizer reads stdin, not a file in the package folder, which may be read-only; Java ignores SIGUSR1, SIGTERM and
SIGINT, which request that a training run stops after its step; `JavaError` is raised if Java fails.
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

LINE_BREAKS = re.compile("[\n\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029]")  # what Java or Python treats as one
# The machine's language must not change scores: in Turkish, the lower case of "I" is not "i".
JAVA_OPTIONS = ("-Duser.language=en", "-Duser.country=US", "-Dfile.encoding=UTF-8")
METEOR_OPTIONS = ("-Xmx2G", "-jar", coco_meteor.METEOR_JAR, "-", "-", "-stdio", "-l", "en", "-norm")
IGNORE_SIGNALS = ("sh", "-c", 'trap "" USR1 TERM INT; exec "$@"', "sh")


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
        """PTB tokens of each text, lower case, no COCO punctuation, joined by spaces. Raises JavaError, OSError."""
        jar = Path(coco_tokenizer.__file__).absolute().with_name(coco_tokenizer.STANFORD_CORENLP_3_4_1_JAR)
        options = ("-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase")
        lines = "\n".join(LINE_BREAKS.sub(" ", text) for text in texts).encode(errors="replace")
        done = subprocess.run(self._command(*options), input=lines, capture_output=True)
        out = done.stdout.decode().split("\n")
        if done.returncode or len(out) != len(texts):
            raise JavaError(f"The PTB tokenizer failed: {self._last_line(done.stderr)}.")
        dropped = coco_tokenizer.PUNCTUATIONS
        return [" ".join(word for word in line.rstrip().split(" ") if word not in dropped) for line in out]

    def meteor(self, references: Sequence[Sequence[str]], candidates: Sequence[str]) -> tuple[float, list[float]]:
        """METEOR 1.5 (English, normalised) of a corpus and of each of its items, in 0..1. Raises JavaError.

        The corpus score is not the mean of the items: the program sums the statistics of all items and scores the sum.
        """
        try:
            if self.meteor_p is None:
                self.lock = threading.Lock()  # new: after an error `compute_score` leaves the old one locked
                self.errors = tempfile.TemporaryFile()  # noqa: SIM115 (an unread pipe could fill and block the program)
                command = self._command(*METEOR_OPTIONS)
                folder, pipe = Path(coco_meteor.__file__).parent.absolute(), subprocess.PIPE  # with paraphrase table
                self.meteor_p = subprocess.Popen(command, cwd=folder, stdin=pipe, stdout=pipe, stderr=self.errors)
            return self.compute_score(dict(enumerate(references)), {i: [text] for i, text in enumerate(candidates)})
        except (OSError, ValueError) as error:  # the process ended, or printed something that is not a number
            raise JavaError(f"METEOR failed: {self.close() or error}.") from error

    def close(self) -> str:
        """Kill METEOR's process, if there is one; returns the last line of its standard error."""
        if self.meteor_p is None:
            return ""
        self.meteor_p.kill()
        self.meteor_p.communicate()
        self.meteor_p = None
        with self.errors:
            self.errors.seek(0)
            return self._last_line(self.errors.read())

    def _stat(self, candidate: str, references: Sequence[str]) -> str:
        """Statistics of one item, from METEOR's SCORE command; called by `compute_score`."""
        texts = [LINE_BREAKS.sub(" ", text).replace("|||", " ") for text in (*references, candidate)]
        cleaned = [re.sub("[ \t]+", " ", text).encode(errors="replace").decode() for text in texts]
        return str(super()._stat(cleaned[-1], cleaned[:-1]))

    def _command(self, *options: str) -> list[str]:
        if shutil.which(self.program) is None:
            hint = "on PATH (Debian: apt-get install default-jre-headless)"
            raise JavaError(f"METEOR and the PTB tokenizer need Java, and there is no command {self.program!r} {hint}.")
        return [*IGNORE_SIGNALS, self.program, *JAVA_OPTIONS, *options]

    @staticmethod
    def _last_line(errors: bytes) -> str:
        lines = errors.decode(errors="replace").strip().splitlines()
        return lines[-1].strip().rstrip(".") if lines else ""

    def __del__(self) -> None:
        self.close()  # the base class's method would wait for the lock


shared_java = functools.cache(Java)
"""The instance of this process. METEOR takes 8 s and 1.2 GB to start; it exits when its stdin closes."""
