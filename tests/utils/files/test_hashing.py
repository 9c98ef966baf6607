"""Hashes of JSON values."""

from __future__ import annotations

import hashlib

from w2r2_ds.utils.files.hashing import json_sha256


def test_json_sha256_is_that_of_the_text_with_sorted_keys() -> None:
    assert json_sha256({"b": 1, "a": [2]}) == json_sha256({"a": [2], "b": 1})
    assert json_sha256({"b": 1, "a": [2]}) == hashlib.sha256(b'{"a": [2], "b": 1}').hexdigest()
    assert json_sha256([1, 2]) != json_sha256([2, 1])
