"""Fixtures: METEOR's Java process, and a machine without Java."""

from __future__ import annotations

import shutil

import pytest

from w2r2_ds.evaluation.metrics.meteor import Java, shared_java

NO_JAVA = "Java is not installed (Debian: apt-get install default-jre-headless)"


@pytest.fixture(scope="session")
def java() -> Java:
    """METEOR's Java process, started once for all tests, because its start takes 8 s."""
    if shutil.which("java") is None:
        pytest.skip(NO_JAVA)
    return shared_java()


@pytest.fixture
def no_java() -> Java:
    """A `Java` whose program does not exist."""
    return Java(program="no-such-java")


@pytest.fixture(params=["java", "no_java"])
def either_java(request: pytest.FixtureRequest) -> Java:
    """Both in turn, for scores that must not depend on Java."""
    found: Java = request.getfixturevalue(request.param)
    return found
