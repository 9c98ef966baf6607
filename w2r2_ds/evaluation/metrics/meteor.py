"""METEOR 1.5 and the PTB tokenizer: pycocoevalcap's Java programs, made safe for any text and for training runs.

pycocoevalcap's `Meteor` and `PTBTokenizer` run the same programs with the same options. Four points differ here:

* Line breaks and ``|||`` inside a text become blanks; pycocoevalcap's wrappers shift or break all later texts.
* The tokenizer reads from stdin; pycocoevalcap's writes a file into its package folder, which may be read-only.
* METEOR's process ignores SIGUSR1 and SIGTERM, which stop a training run after its current step.
* Errors of Java are raised, as `JavaError`.
"""

from __future__ import annotations

import atexit
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

# Every character that Java or Python may take for the end of a line.
LINE_BREAKS = re.compile("[\n\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029]")
# The machine's language must not change the numbers: in Turkish, the lower case of "I" is not "i".
JAVA_OPTIONS = ("-Duser.language=en", "-Duser.country=US", "-Dfile.encoding=UTF-8")
IGNORE_SIGNALS = ("sh", "-c", 'trap "" USR1 TERM; exec "$@"', "sh")


class JavaError(RuntimeError):
    """Java is missing, or one of its programs failed."""


@functools.cache
def shared_java() -> Java:
    """The instance of this process: METEOR takes 8 s and 1.2 GB to start, so it starts once."""
    java = Java()
    atexit.register(java.close)
    return java


class Java:
    """The tokenizer, and METEOR in a process that starts at the first use.

    Args:
        program: name or path of the ``java`` command.
    """

    def __init__(self, program: str = "java") -> None:
        self.program = program
        self._lock = threading.Lock()
        self._meteor: _Meteor | None = None

    def tokenize(self, texts: Sequence[str]) -> list[str]:
        """PTB tokens of each text in lower case, without COCO's list of punctuation, joined by one blank.

        All texts go through one process (0.7 s). Raises JavaError.
        """
        if not texts:
            return []
        # Not a subclass: the file in the package folder is written by PTBTokenizer's only method.
        archive = Path(coco_tokenizer.__file__).with_name(coco_tokenizer.STANFORD_CORENLP_3_4_1_JAR)
        command = [self._path(), *JAVA_OPTIONS, "-cp", str(archive.absolute())]
        command += ["edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
        lines = "\n".join(LINE_BREAKS.sub(" ", text) for text in texts)
        try:
            done = subprocess.run(command, input=lines.encode(errors="replace"), capture_output=True, check=False)
        except OSError as error:
            raise JavaError(f"{self.program} could not be started ({error}).") from error
        out = done.stdout.decode().split("\n")
        if done.returncode or len(out) != len(texts):
            raise JavaError(f"The PTB tokenizer failed: {_last_line(done.stderr)}.")
        dropped = coco_tokenizer.PUNCTUATIONS
        return [" ".join(word for word in line.rstrip().split(" ") if word not in dropped) for line in out]

    def meteor(self, references: Sequence[Sequence[str]], candidates: Sequence[str]) -> tuple[float, list[float]]:
        """METEOR 1.5 (English, normalised) of a corpus and of each of its items, in 0..1.

        The corpus score is not the mean of the items: the program sums the statistics of all items and scores the sum.

        Args:
            references: at least one per item.
            candidates: one per item, tokenized as the protocol requires.

        Raises:
            JavaError: Java is missing or failed.
        """
        texts = {index: list(each) for index, each in enumerate(references)}
        given = {index: [each] for index, each in enumerate(candidates)}
        with self._lock:
            try:
                if self._meteor is None:
                    self._meteor = _Meteor(self._path())
                corpus, items = self._meteor.compute_score(texts, given)
                return corpus, items
            except (OSError, ValueError) as error:  # the process ended, or printed something else than numbers
                raise JavaError(f"METEOR failed: {self._stop() or error}.") from error

    def close(self) -> None:
        """End METEOR's process, if there is one."""
        with self._lock:
            self._stop()

    def _path(self) -> str:
        path = shutil.which(self.program)
        if path is None:
            raise JavaError(
                f"METEOR and the PTB tokenizer need Java, and there is no command {self.program!r} on PATH "
                "(Debian: apt-get install default-jre-headless)."
            )
        return path

    def _stop(self) -> str:
        """End METEOR's process; returns the last line of its standard error."""
        process, self._meteor = self._meteor, None
        return process.stop() if process else ""


class _Meteor(coco_meteor.Meteor):  # type: ignore[misc]
    """pycocoevalcap's client with another start, end and line format."""

    def __init__(self, java: str) -> None:
        # A file instead of a pipe: a full pipe that is not read would block the program.
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as the process)
        archive = coco_meteor.METEOR_JAR
        self.lock = threading.Lock()
        self.meteor_p = subprocess.Popen(
            [*IGNORE_SIGNALS, java, *JAVA_OPTIONS, "-Xmx2G", "-jar", archive, "-", "-", "-stdio", "-l", "en", "-norm"],
            cwd=Path(coco_meteor.__file__).absolute().parent,  # METEOR finds its paraphrase table there
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
        )

    def _stat(self, candidate: str, references: Sequence[str]) -> str:
        """Statistics of one item: METEOR's SCORE command, whose fields are separated by ``|||``."""
        line = " ||| ".join(["SCORE", *map(_field, references), _field(candidate)])
        stdin, stdout = self.meteor_p.stdin, self.meteor_p.stdout
        assert stdin is not None and stdout is not None
        stdin.write(line.encode(errors="replace") + b"\n")
        stdin.flush()
        answer = stdout.readline()
        if not answer.endswith(b"\n"):
            raise OSError("its process ended")
        return answer.decode().strip()

    def stop(self) -> str:
        """Kill the process; returns the last line of its standard error."""
        self.meteor_p.kill()
        self.meteor_p.communicate()
        self.errors.seek(0)
        line = _last_line(self.errors.read())
        self.errors.close()
        return line

    def __del__(self) -> None:
        """Replaces the base class's, which waits for a lock that an error in `compute_score` leaves held."""


def _field(text: str) -> str:
    """A text that ends neither the line nor the field."""
    return re.sub("[ \t]+", " ", LINE_BREAKS.sub(" ", text).replace("|||", " "))


def _last_line(errors: bytes) -> str:
    lines = errors.decode(errors="replace").strip().splitlines()
    return lines[-1].strip().rstrip(".") if lines else ""
