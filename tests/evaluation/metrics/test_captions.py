"""Caption scores: rejected inputs, scores that cannot be computed, and unusual texts."""

from __future__ import annotations

import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from pycocoevalcap.tokenizer import ptbtokenizer

from w2r2_ds.evaluation.metrics.captions import CAPTION_METRICS, ITEM_MEAN, score_captions
from w2r2_ds.evaluation.metrics.meteor import Java, JavaError

PLAIN = tuple(name for name in CAPTION_METRICS if name != "METEOR")
REFERENCES = {"a": ["the chair is black"], "b": ["a brown desk", "the desk is brown"]}
CANDIDATES = {"a": "the chair is black", "b": "the desk"}
BREAKS = ["\n", "\r", "\r\n", "\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\u2029"]


def fake_java(folder: Path, script: str) -> Java:
    """A stub of Java that runs the given Python code."""
    path = folder / "fake-java"
    path.write_text(f"#!{sys.executable}\n{script}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return Java(program=str(path))


def test_without_java_meteor_is_none_with_a_reason(no_java: Java) -> None:
    scores = score_captions(REFERENCES, CANDIDATES, java=no_java)
    assert scores.corpus["METEOR"] is None and scores.corpus[ITEM_MEAN] is None
    assert all(item["METEOR"] is None for item in scores.items.values())
    assert all(isinstance(scores.corpus[name], float) for name in PLAIN)
    assert scores.not_computed.keys() == {"METEOR", ITEM_MEAN}
    assert "need Java, and there is no command 'no-such-java' on PATH" in scores.not_computed["METEOR"]


def test_without_java_tokenized_scores_are_none(no_java: Java) -> None:
    scores = score_captions(REFERENCES, CANDIDATES, "ptb", java=no_java)
    assert scores.corpus.keys() == scores.not_computed.keys() == {*CAPTION_METRICS, ITEM_MEAN}
    assert set(scores.corpus.values()) == {None}
    assert all(item.keys() == set(CAPTION_METRICS) and set(item.values()) == {None} for item in scores.items.values())


def test_scores_without_java_equal_those_with_java(java: Java, no_java: Java) -> None:
    ours, theirs = (score_captions(REFERENCES, CANDIDATES, java=each) for each in (java, no_java))
    assert {name: ours.corpus[name] for name in PLAIN} == {name: theirs.corpus[name] for name in PLAIN}
    assert ours.not_computed == {}


def test_a_java_process_that_dies_gives_a_reason(tmp_path: Path) -> None:
    dying = fake_java(tmp_path, "import sys\nsys.exit('warming up\\nno memory left.')")
    scores = score_captions(REFERENCES, CANDIDATES, java=dying)
    assert scores.corpus["METEOR"] is None
    assert scores.not_computed["METEOR"] == "METEOR failed: no memory left."
    with pytest.raises(JavaError, match=r"tokenizer failed: no memory left\."):
        dying.tokenize(["a chair"])


def test_invalid_java_output_gives_a_reason(tmp_path: Path) -> None:
    talking = fake_java(tmp_path, "print('no number', flush=True)\n" * 8 + "input()")
    assert score_captions(REFERENCES, CANDIDATES, java=talking).not_computed["METEOR"].startswith("METEOR failed: ")
    with pytest.raises(JavaError):
        talking.tokenize(["a chair"])


def test_a_file_that_is_not_executable_gives_a_reason(tmp_path: Path) -> None:
    path = tmp_path / "java"
    path.write_bytes(b"\x00\x01")
    path.chmod(0o755)
    broken = Java(program=str(path))
    with pytest.raises(JavaError, match="tokenizer failed"):
        broken.tokenize(["a chair"])
    assert score_captions(REFERENCES, CANDIDATES, java=broken).corpus["METEOR"] is None


@pytest.mark.parametrize("end", BREAKS, ids=ascii)
def test_line_breaks_in_captions_do_not_shift_scores(java: Java, end: str) -> None:
    texts = [f"the chair{end}is black.", "", f"{end}", "a desk"]
    assert java.tokenize(texts) == ["the chair is black", "", "", "a desk"]
    broken = {"a": f"the chair{end}is black", "b": f"the{end}desk"}
    whole = score_captions(REFERENCES, CANDIDATES, java=java)
    torn = score_captions(
        {key: [t.replace(" is", f"{end}is") for t in r] for key, r in REFERENCES.items()}, broken, java=java
    )
    assert torn.corpus["METEOR"] == whole.corpus["METEOR"]


def test_meteors_field_separator_does_not_change_scores(java: Java) -> None:
    plain, items = java.meteor([["a black chair"], ["a desk"]], ["a black chair", "a desk"])
    marked = java.meteor([["a black ||| chair"], ["a desk"]], ["a black ||| chair", "a |||desk"])
    assert marked == (plain, items)


def test_unusual_characters_are_scored_as_words(java: Java) -> None:
    """An unpaired surrogate (JSON can contain one), NUL, emoji."""
    odd = ["\ud800 chair", "chair\x00", "a \U0001f6cb sofa", "   "]
    tokens = java.tokenize(odd)
    assert len(tokens) == len(odd) and tokens[2] == "a sofa" and tokens[3] == ""
    scores = score_captions({str(i): ["a chair"] for i in range(4)}, {str(i): t for i, t in enumerate(odd)}, java=java)
    assert all(isinstance(score, float) for score in scores.corpus.values())


def test_nothing_is_written_beside_the_jars(java: Java) -> None:
    folder = Path(ptbtokenizer.__file__).parent
    before = folder.stat().st_mtime_ns
    java.tokenize(["a chair"] * 10)
    assert folder.stat().st_mtime_ns == before


def test_many_captions_do_not_block_the_pipes(java: Java) -> None:
    texts = [f"the chair number {i} is black. " * 20 for i in range(500)]
    tokens = java.tokenize(texts)
    assert len(tokens) == len(texts) and tokens[123].startswith("the chair number 123 is black the")


def test_meteor_restarts_after_close(tmp_path: Path) -> None:
    count = tmp_path / "starts"
    answers = "print('1.0 2.0', flush=True)\ninput()\nprint('0.5\\n0.25', flush=True)\ninput()"
    script = f"open({str(count)!r}, 'a').write('x')\ninput()\n{answers}"
    java = fake_java(tmp_path, script)
    for _ in range(2):
        assert java.meteor([["a"]], ["a"]) == (0.25, [0.5])
        java.close()
    assert count.read_text() == "xx"


def test_meteor_ignores_sigusr1_and_sigterm(java: Java) -> None:
    before = score_captions(REFERENCES, CANDIDATES, java=java).corpus["METEOR"]
    assert java.meteor_p is not None
    process = java.meteor_p
    for number in (signal.SIGUSR1, signal.SIGTERM):
        process.send_signal(number)
    assert score_captions(REFERENCES, CANDIDATES, java=java).corpus["METEOR"] == before
    assert java.meteor_p is process and process.poll() is None


def test_references_without_words_have_no_cider(no_java: Java) -> None:
    scores = score_captions({"a": [""], "b": [" "]}, {"a": "chair", "b": ""}, java=no_java)
    assert scores.corpus["CIDEr"] is None and "document frequencies" in scores.not_computed["CIDEr"]
    assert scores.corpus["BLEU-1"] is not None


def test_missing_captions_or_references_raise(no_java: Java) -> None:
    with pytest.raises(ValueError, match="no captions to score"):
        score_captions({}, {}, java=no_java)
    with pytest.raises(ValueError, match=r"same keys; 2 have only one, such as 'a'"):
        score_captions({"a": ["x"]}, {"b": "x"}, java=no_java)
    with pytest.raises(ValueError, match=r"1 captions have no reference, the first is 'a'"):
        score_captions({"a": []}, {"a": "x"}, java=no_java)


def test_without_the_package_the_error_names_the_extra(no_java: Java, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocoevalcap.bleu.bleu", None)
    with pytest.raises(ValueError, match=r"pip install 'w2r2-ds\[metrics\]'"):
        score_captions(REFERENCES, CANDIDATES, java=no_java)


def test_without_the_wrapper_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "w2r2_ds.evaluation.metrics.meteor")
    monkeypatch.setitem(sys.modules, "pycocoevalcap.meteor", None)
    with pytest.raises(ValueError, match=r"pip install 'w2r2-ds\[metrics\]'"):
        score_captions(REFERENCES, CANDIDATES)


def test_the_tokenizer_ignores_sigusr1_and_sigterm(tmp_path: Path) -> None:
    kill = "os.kill(os.getpid(), signal.SIGTERM)\nos.kill(os.getpid(), signal.SIGUSR1)"
    java = fake_java(tmp_path, f"import os, signal, sys\n{kill}\nsys.stdout.write(sys.stdin.read())")
    assert java.tokenize(["a chair", "a desk"]) == ["a chair", "a desk"]


def test_a_process_that_cannot_be_started_is_not_computed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    java = fake_java(tmp_path, "")

    def fail(*command: object, **options: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", fail)
    assert score_captions(REFERENCES, CANDIDATES, java=java).not_computed.keys() == {"METEOR", ITEM_MEAN}
    assert score_captions(REFERENCES, CANDIDATES, "ptb", java=java).not_computed.keys() == {*CAPTION_METRICS, ITEM_MEAN}
