"""How commands end: errors in one line, Ctrl-C, an output that lacks a character, JSON alone on standard output."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from fork_server import ROOT, environment
from w2r2_ds.commands import COMMANDS, errors, main
from w2r2_ds.commands.errors import reports_errors
from w2r2_ds.training.fault_tolerance.exit_codes import DONE, FAILED, INTERRUPTED

TEXT = "━ 椅子 стул"
"""A box character and names of two scripts; neither latin-1 nor ASCII has one of the letters."""
PRINTS = f"""
import logging, sys
from rich.console import Console
from rich.table import Table
from w2r2_ds.commands.errors import reports_errors
from w2r2_ds.utils.logging import ignore_write_errors, setup_logging
from w2r2_ds.utils.progress import progress
TEXT = {TEXT!r}

@reports_errors("test")
def main():
    setup_logging()
    if "ignore" in sys.argv:
        ignore_write_errors("stdout")
    print(TEXT, flush=True)
    print(TEXT, file=sys.stderr)
    logging.getLogger("w2r2_ds.test").info(TEXT)
    for stream in (sys.stdout, sys.stderr):
        for terminal in (False, True):
            console = Console(file=stream, force_terminal=terminal)
            with progress(TEXT, 2, console=console) as advance:
                advance()
                advance()
            table = Table(title=TEXT)
            table.add_row(TEXT)
            console.print(table)
    print("reached")

sys.exit(main())
"""
PRINTS_JSON = ("evaluate",)
"""Commands whose result is JSON on standard output."""


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_reports_errors(command: str) -> None:
    main = import_module(f"w2r2_ds.commands.{command}").main
    assert hasattr(main, "__wrapped__"), "main is decorated with reports_errors"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "ascii:strict"])
@pytest.mark.parametrize("mode", ["", "ignore"])
def test_a_character_that_the_output_lacks_is_escaped(encoding: str, mode: str) -> None:
    variables = environment() | {"PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", PRINTS, mode], env=variables, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    escaped = TEXT.encode("ascii", "backslashreplace")
    assert done.stdout.startswith(escaped + b"\n") and done.stdout.endswith(b"reached\n")
    assert done.stderr.count(escaped) >= 2  # printed and logged


@pytest.mark.parametrize(
    "error",
    [
        ValueError("the sentence."),
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/out/file"),
        PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/out/file"),
    ],
)
def test_an_error_is_one_line_and_exit_code_1(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    @reports_errors("test")
    def run() -> None:
        raise error

    assert run() == FAILED
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("w2r2 test: ")
    if isinstance(error, OSError):
        assert error.filename in line and error.strerror in line and "Errno" not in line


def test_other_exceptions_keep_their_traceback() -> None:
    @reports_errors("test")
    def run() -> None:
        raise KeyError("a bug")

    with pytest.raises(KeyError, match="a bug"):
        run()


@pytest.mark.parametrize("rank", [0, 1])
def test_ctrl_c_is_one_line_of_rank_0(
    rank: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))

    @reports_errors("test")
    def run() -> None:
        raise KeyboardInterrupt

    assert run() == INTERRUPTED
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 - rank and all(line.startswith("w2r2 test: ") for line in lines)


def test_exit_codes_pass() -> None:
    assert reports_errors("test")(lambda: None)() == DONE
    assert reports_errors("test")(lambda: 85)() == 85


def test_commands_that_print_json() -> None:
    """The list of this file is complete: no other command prints JSON."""
    sources = {name: Path(import_module(f"w2r2_ds.commands.{name}").__file__ or "") for name in COMMANDS}
    printing = [name for name, file in sources.items() if re.search(r"print\(json\.", file.read_text())]
    assert tuple(printing) == PRINTS_JSON


NOISY = """
import ctypes, subprocess, sys
print("a library prints at import")
subprocess.run(["echo", "a child process prints"])
ctypes.CDLL(None).printf(b"compiled code prints\\n")
"""


@pytest.mark.parametrize("command", PRINTS_JSON)
def test_standard_output_is_json_alone(command: str, tmp_path: Path) -> None:
    """A plug-in and a library that print at import, as child processes and compiled code do."""
    (tmp_path / "noisy_plugin.py").write_text(NOISY)
    program = f"""
import sys
from w2r2_ds.evaluation.predictions import rescore
def score_file(*arguments):
    exec({NOISY!r})
    return {{"scores": 1}}
rescore.score_file = score_file
from w2r2_ds.commands import main
sys.exit(main({[command, "--plugin", str(tmp_path / "noisy_plugin.py"), "--score_only", "x"]}))
"""
    done = subprocess.run([sys.executable, "-c", program], env=environment(), capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"scores": 1}
    for text in ("a library prints at import", "a child process prints", "compiled code prints"):
        assert done.stderr.count(text) == 2, "of the plug-in and of the library"


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_a_closed_output_is_no_error(closed: str, tmp_path: Path) -> None:
    """As a daemon or a batch system may start a command: Python's sys.stdout or sys.stderr is None."""
    (tmp_path / "noisy_plugin.py").write_text(NOISY)
    end = tmp_path / "end"
    program = f"""
import sys
from pathlib import Path
from w2r2_ds.commands.common import command_words
from w2r2_ds.commands.errors import reports_errors
@reports_errors("test")
def main():
    words = command_words(["--plugin", {str(tmp_path / "noisy_plugin.py")!r}, "--word"])
    print("result")
    Path({str(end)!r}).write_text(" ".join(words))
sys.exit(main())
"""
    file = tmp_path / "program.py"
    file.write_text(program)
    words = ["sh", "-c", f'exec "$0" "$1" {closed}', sys.executable, str(file)]
    done = subprocess.run(words, env=environment(), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert end.read_text() == "--word"
    assert done.stdout.endswith("" if closed.startswith(">") else "result\n")


def test_help_is_on_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    for command in PRINTS_JSON:
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert capsys.readouterr().out.startswith(f"usage: w2r2 {command}")


def test_error_text_names_both_files_of_a_rename() -> None:
    error = OSError(errno.EXDEV, os.strerror(errno.EXDEV), "/a", None, "/b")
    assert errors.error_text(error) == f"/a -> /b: {os.strerror(errno.EXDEV)}."


@pytest.mark.parametrize("kind", ["below a file", "a file", "not writable"])
@pytest.mark.parametrize(
    "words",
    [
        "bench kernels --json OUT/report.json",
        "prepare synthetic --out OUT",
        "prepare scanqa --root ROOT --out OUT",
        "evaluate --score_only FILE --out OUT",
    ],
)
def test_an_output_that_cannot_be_written_is_named_at_the_start(
    words: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Export, conversion, evaluation and training are in the tests of their modules."""
    file = tmp_path / "file"
    file.write_text("mine")
    out = {"below a file": file / "out", "a file": file, "not writable": Path("/proc/out")}[kind]
    words = words.replace("OUT", str(out)).replace("ROOT", str(tmp_path)).replace("FILE", str(file))
    assert main(words.split()) == FAILED
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"w2r2 {words.split()[0]}: ") and str(out) in line, line
    assert file.read_text() == "mine" and os.listdir(tmp_path) == ["file"]
