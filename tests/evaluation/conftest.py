"""Java with and without, for the tests of caption scores."""

from __future__ import annotations

import shutil

import pytest

from w2r2_ds.evaluation.metrics.meteor import Java, shared_java

NO_JAVA = "there is no Java here (Debian: apt-get install default-jre-headless)"


@pytest.fixture(scope="session")
def java() -> Java:
    """METEOR's process is started once for all tests: it takes 8 s."""
    if shutil.which("java") is None:
        pytest.skip(NO_JAVA)
    return shared_java()


@pytest.fixture
def no_java() -> Java:
    """A machine without Java."""
    return Java(program="no-such-java")


@pytest.fixture(params=["java", "no_java"])
def either_java(request: pytest.FixtureRequest) -> Java:
    """One after the other: what needs no Java is the same in both."""
    found: Java = request.getfixturevalue(request.param)
    return found
