"""Escape untrusted text and hide credentials before text is printed or logged.

Names, labels and sentences come from annotation files, archives and models. Escape sequences could change the terminal,
and line breaks could fake log lines.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

# Name of an environment variable; user of a URL; query parameter of a URL; tokens of Hugging Face, GitHub and GitLab.
_SECRET_NAME = re.compile(r"(?:^|_)(?:TOKEN|KEY|APIKEY|SECRET|PASS|PASSWD|PASSWORD|JWT|CREDENTIALS)$")
_URL_USER = re.compile(r"(?<=://)[^\s/@]+(?=@)")
_URL_QUERY = re.compile(
    r"([?&](?:[\w.-]*[_.-])?(?:token|(?:api)?key|secret|pass|passwd|password|jwt|sig|signature|credential)=)[^\s&#'\"]+",
    re.IGNORECASE,
)
_TOKEN = re.compile(r"\b(?:hf_[A-Za-z0-9]{30,}|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{22,}|glpat-[\w-]{20,})")
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
"""Control characters, line breaks, and marks that change the text direction."""
MIN_SECRET = 8
"""Minimum length of a secret. A shorter value is a placeholder, and hiding it would damage other text."""
MIN_KEY = 12
"""Minimum length of a secret in a variable whose name ends in KEY; it must also have letters and digits.

Other values are words, as in PRIMARY_KEY=scanrefer, and hiding them would damage other text.
"""
HIDDEN = "[hidden]"


def one_line(text: str) -> str:
    r"""Escape every unprintable character, including line breaks, as in Python (``\x1b``)."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)


def lines(text: str) -> str:
    """Escape every line; all but the first are indented, so that they cannot be taken for other log lines."""
    # Lines that are indented already, as those of `parallel.listed`, are not indented further.
    return "\n  ".join(one_line(line.removeprefix("  ")) for line in text.split("\n"))


def message(error: object) -> str:
    """Error message for the user: escaped with `lines`, without credentials."""
    return lines(without_secrets(str(error)))


def without_secrets(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """Hide credentials: values of environment variables (tokens, keys), credentials in URLs, known token formats."""
    for value in secrets(environment):
        text = text.replace(value, HIDDEN)
    return _TOKEN.sub(HIDDEN, _URL_QUERY.sub(rf"\1{HIDDEN}", _URL_USER.sub(HIDDEN, text)))


def has_secret(text: str, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the text contains credentials."""
    return without_secrets(text, environment) != text


def secrets(environment: Mapping[str, str] = os.environ) -> list[str]:
    """Values of environment variables with the name of a token, key, secret or password, longest first.

    A secret may be part of another one; the longer one must be replaced first.
    """
    found = {value.strip() for name, value in environment.items() if _is_secret(name.upper(), value.strip())}
    return sorted(found, key=lambda value: (-len(value), value))


def _is_secret(name: str, value: str) -> bool:
    """Whether a variable (name in upper case) holds a secret, not a placeholder, a word or a path."""
    if not _SECRET_NAME.search(name) or len(value) < MIN_SECRET:
        return False
    if name.endswith("KEY") and (
        len(value) < MIN_KEY or not re.search(r"[^\W\d_]", value) or not re.search(r"\d", value)
    ):
        return False
    return not os.path.exists(os.path.expanduser(value))  # a path, such as SSH_KEY=~/.ssh/id_rsa, is not secret
