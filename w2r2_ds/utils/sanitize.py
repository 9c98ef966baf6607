"""Escape untrusted text, and hide credentials, before it is printed or logged.

Names, labels and sentences come from annotation files, archives and models. An escape sequence could rewrite the
terminal, a line break could forge a log line, and rich would interpret ``[red]`` as markup.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from rich.markup import escape

_SECRET_NAME = re.compile(r"(?:^|_)(?:TOKEN|KEY|APIKEY|SECRET|PASS|PASSWD|PASSWORD|JWT|CREDENTIALS)$")
_USER = re.compile(r"(?<=://)[^\s/@]+(?=@)")
_QUERY = re.compile(
    r"([?&](?:[\w.-]*[_.-])?(?:token|(?:api)?key|secret|pass|passwd|password|jwt|sig|signature|credential)=)[^\s&#'\"]+",
    re.IGNORECASE,
)
_SHAPE = re.compile(r"\b(?:hf_[A-Za-z0-9]{30,}|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{22,}|glpat-[\w-]{20,})")
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
"""Characters that no name contains: control characters, line breaks, and marks that change the text direction."""
LEAST_SECRET = 8
"""Minimum length of a secret; shorter values are placeholders and would match everywhere."""
LEAST_KEY = 12
"""Characters of a key, which has letters and digits, too: a service makes them at random, and longer. KEY is also a
dictionary's, a column's or a sort's, whose value is a word (PRIMARY_KEY=scanrefer) and would be found in honest names.
"""
HIDDEN = "[hidden]"


def one_line(text: str) -> str:
    r"""The text with every character that does not print, line breaks too, as Python's escape, ``\x1b``."""
    return "".join(char if char.isprintable() else _escape(char) for char in text)


def lines(text: str) -> str:
    """The same line by line; all but the first are indented, so that none can pass for the next line of a log."""
    return "\n  ".join(one_line(line.removeprefix("  ")) for line in text.split("\n"))


def for_rich(text: str) -> str:
    """The text for a rich table, panel or progress line: on one line, its square brackets no markup."""
    return escape(one_line(text))


def message(error: object) -> str:
    """An error message for the user: `lines`, without secrets."""
    return lines(without_secrets(str(error)))


def without_secrets(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """The text with credentials hidden: values of the environment's tokens and keys, those of URLs, known shapes."""
    for value in secrets(environment):
        text = text.replace(value, HIDDEN)
    return _SHAPE.sub(HIDDEN, _QUERY.sub(rf"\1{HIDDEN}", _USER.sub(HIDDEN, text)))


def holds_secret(text: str, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether `without_secrets` would change it."""
    return without_secrets(text, environment) != text


def secrets(environment: Mapping[str, str] = os.environ) -> list[str]:
    """Values of variables that are called a token, a key, a secret or a password, longest first."""
    found = {value.strip() for name, value in environment.items() if _is_secret(name.upper(), value.strip())}
    return sorted(found, key=lambda value: (-len(value), value))


def _is_secret(name: str, value: str) -> bool:
    if not _SECRET_NAME.search(name) or len(value) < LEAST_SECRET:
        return False
    if name.endswith("KEY") and (
        len(value) < LEAST_KEY or not re.search(r"[^\W\d_]", value) or not re.search(r"\d", value)
    ):
        return False
    return not os.path.exists(os.path.expanduser(value))  # SSH_KEY=~/.ssh/id_rsa says where it lies


def _escape(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii") if not "\ud800" <= char <= "\udfff" else f"\\u{ord(char):04x}"
