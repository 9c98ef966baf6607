"""METEOR 1.5 and the PTB tokenizer: two Java programs, run from the jars that pycocoevalcap carries.

Their numbers have no equal in Python (METEOR's paraphrase table, the tokenizer's grammar), so without Java there is
none. pycocoevalcap's own wrappers (``meteor/meteor.py``, ``tokenizer/ptbtokenizer.py``) start the same programs with
the same options, but fail where this does not: a line break inside a caption shifts or breaks all later ones, the
tokenizer writes a file into its own package directory, and an error of Java is lost.
"""

from __future__ import annotations

import atexit
import functools
import importlib.util
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import IO

METEOR_JAR = "meteor/meteor-1.5.jar"
TOKENIZER_JAR = "tokenizer/stanford-corenlp-3.4.1.jar"

PUNCTUATION = frozenset(
    ("''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";")
)
"""Tokens that COCO's caption evaluation drops after tokenizing. Brackets stay: the tokenizer lower-cases them first."""

LINE_BREAKS = re.compile("[\n\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029]")
"""Whatever Java or Python may take for the end of a line."""

BLANKS = re.compile("[ \t]+")

# The machine's language and encoding must not reach the numbers (in Turkish, "I" is no capital "i").
JAVA_OPTIONS = ("-Duser.language=en", "-Duser.country=US", "-Dfile.encoding=UTF-8")
DEAF = ("sh", "-c", 'trap "" USR1 TERM; exec "$@"', "sh")
"""Goes before the command of the process that stays: what stops a training run at its next step must not take this one
before; it ends with its input, or by `kill`."""


class JavaError(RuntimeError):
    """Java is missing, or one of its programs failed; the message is one sentence."""


@functools.cache
def shared_java() -> Java:
    """The one instance of this process: METEOR takes 8 s and 1.2 GB to start, so it starts once."""
    java = Java()
    atexit.register(java.close)
    return java


class Java:
    """Starts Java programs when they are first needed, and says why where it cannot.

    Args:
        program: name or path of the ``java`` command.
    """

    def __init__(self, program: str = "java") -> None:
        self.program = program
        self._lock = threading.Lock()
        self._meteor: subprocess.Popen[bytes] | None = None
        self._errors: IO[bytes] | None = None

    def tokenize(self, texts: Sequence[str]) -> list[str]:
        """PTB tokens of each text: lower case, punctuation dropped, joined by one blank.

        Stanford CoreNLP 3.4.1's ``PTBTokenizer -preserveLines -lowerCase``, then COCO's list of dropped tokens
        (tylin/coco-caption, ``pycocoevalcap/tokenizer/ptbtokenizer.py``). All texts go through one process (0.7 s).

        Raises:
            JavaError: Java is missing or failed.
        """
        if not texts:
            return []
        command = [self._path(), *JAVA_OPTIONS, "-cp", str(jar(TOKENIZER_JAR))]
        command += ["edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
        lines = "\n".join(LINE_BREAKS.sub(" ", text) for text in texts)
        try:
            # From stdin: nothing has to be written anywhere.
            done = subprocess.run(command, input=lines.encode(errors="replace"), capture_output=True, check=False)
        except OSError as error:
            raise JavaError(f"{self.program} could not be started ({error}).") from error
        out = done.stdout.decode().split("\n")
        if done.returncode or len(out) != len(texts):
            raise JavaError(f"The PTB tokenizer failed: {_last_line(done.stderr)}.")
        return [" ".join(word for word in line.rstrip().split(" ") if word not in PUNCTUATION) for line in out]

    def meteor(self, references: Sequence[Sequence[str]], candidates: Sequence[str]) -> tuple[float, list[float]]:
        """METEOR 1.5 (English, normalised) of a corpus and of each of its items, in 0..1.

        The corpus score is not the mean of the items: the program sums the statistics of all items and scores the sum.
        Source: tylin/coco-caption, ``pycocoevalcap/meteor/meteor.py``: the same program and protocol.

        Args:
            references: at least one per item.
            candidates: one per item, already tokenized as the protocol wants.

        Raises:
            JavaError: Java is missing or failed.
        """
        with self._lock:
            try:
                statistics = [self._ask(_score_line(r, c)) for r, c in zip(references, candidates, strict=True)]
                self._write(" ||| ".join(["EVAL", *statistics]))
                items = [float(self._read()) for _ in statistics]
                return float(self._read()), items
            except (OSError, ValueError) as error:
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

    def _process(self) -> subprocess.Popen[bytes]:
        if self._meteor is None or self._meteor.poll() is not None:
            self._stop()
            path, archive = self._path(), jar(METEOR_JAR)
            command = [path, *JAVA_OPTIONS, "-Xmx2G", "-jar", archive.name, "-", "-", "-stdio", "-l", "en", "-norm"]
            # A file and no pipe: nobody reads it until something fails, and a full pipe would block the program.
            self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (it lives as long as the process)
            self._meteor = subprocess.Popen(
                # In its directory, because it looks for its paraphrase table there.
                [*DEAF, *command],
                cwd=archive.parent,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
            )
        return self._meteor

    def _ask(self, line: str) -> str:
        self._write(line)
        return self._read()

    def _write(self, line: str) -> None:
        stdin = self._process().stdin
        assert stdin is not None
        stdin.write(line.encode(errors="replace") + b"\n")
        stdin.flush()

    def _read(self) -> str:
        process = self._meteor
        assert process is not None and process.stdout is not None
        line = process.stdout.readline()
        if not line.endswith(b"\n"):
            raise OSError("its process ended")
        return line.decode().strip()

    def _stop(self) -> str:
        """End the process; the last line that it wrote about errors."""
        said = ""
        if self._meteor is not None:
            self._meteor.kill()
            self._meteor.wait()
            for stream in (self._meteor.stdin, self._meteor.stdout):
                assert stream is not None
                try:
                    stream.close()
                except OSError:  # a line that it did not take any more
                    continue
            self._meteor = None
        if self._errors is not None:
            self._errors.seek(0)
            said = _last_line(self._errors.read())
            self._errors.close()
            self._errors = None
        return said


def jar(name: str) -> Path:
    """A file of the installed pycocoevalcap, without importing it.

    Raises:
        JavaError: the package, or the file in it, is missing.
    """
    found = importlib.util.find_spec("pycocoevalcap")
    for folder in (found.submodule_search_locations or ()) if found else ():
        path = Path(folder) / name
        if path.is_file():
            return path.absolute()
    raise JavaError(f"pycocoevalcap's {name} is not installed (pip install 'w2r2-ds[metrics]').")


def _score_line(references: Sequence[str], candidate: str) -> str:
    """METEOR's question about one item: one line, fields between ``|||``."""
    return " ||| ".join(["SCORE", *map(_field, references), _field(candidate)])


def _field(text: str) -> str:
    """A text that can neither end the line nor the field."""
    return BLANKS.sub(" ", LINE_BREAKS.sub(" ", text).replace("|||", " "))


def _last_line(errors: bytes) -> str:
    """What a program said last, without the full stop."""
    lines = errors.decode(errors="replace").strip().splitlines()
    return lines[-1].strip().rstrip(".") if lines else ""
