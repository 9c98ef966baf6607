"""Check a configuration for control characters and secrets: it is written to logs, checkpoints and model cards."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping
from typing import Any

from w2r2_ds.utils.sanitize import CONTROL, has_secret, one_line


def check_config_texts(tree: Mapping[str, Any]) -> None:
    """Check every string of a configuration.

    Args:
        tree: nested dictionaries and lists, as `dataclasses.asdict` makes them.

    Raises:
        ValueError: a string contains a control character, or a key, token or password (not in the message).
    """
    for name, text in _strings(tree, ""):
        if has_secret(text):
            raise ValueError(
                f"{name} holds a key, a token or a password, which would be written into config.yaml, checkpoints "
                "and model cards; set HF_TOKEN or WANDB_API_KEY instead, or use `hf auth login` or `wandb login`."
            )
        if found := CONTROL.search(text):
            kind = unicodedata.name(found[0], "a control character")
            raise ValueError(f"{name} is '{one_line(text)}', which contains {kind}; remove it.")


def _strings(tree: Any, name: str) -> Iterator[tuple[str, str]]:
    """Dotted name and value of every string below `tree`."""
    if isinstance(tree, str):
        yield name, tree
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _strings(value, f"{name}.{key}" if name else str(key))
    elif isinstance(tree, list):
        for index, value in enumerate(tree):
            yield from _strings(value, f"{name}[{index}]")
