"""Check that code and documents use standard terms: ``python scripts/check_words.py [--report]``.

Prints one line per hit as FILE:LINE: WORD (use REPLACEMENT) and exits with 1 if there is any. With --report it prints
the number of hits per folder and exits with 0.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PLACES = (
    "w2r2_ds",
    "launchers",
    "docs",
    "slurm",
    "examples",
    "scripts",
    "tests",
    "README.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
)
"""Files and folders to check."""
SUFFIXES = {".py", ".md", ".sh", ".sbatch", ".yaml", ".env", ".toml"}

SUBJECT = (
    "rank|model|code|loader|collator|sampler|cache|run|test|step|pass|shortcut|checkpoint|manifest|config|configuration|"
    "recipe|file|folder|task|batch|trainer|watchdog|optimizer|launcher|command|script|metric|scorer|message|error|page|"
    "module|layer|kernel|parser|store|term|pytorch|torch|deepspeed|peft|transformers"
)
"""Nouns for code and data."""
VERBS = (
    "says?|said|tells?|told|knows?|sees?|hears?|heard|wants?|looks?|looked|asks?|asked|meets?|met|judges?|believes?|thinks?|"
    "notices?|noticed|remembers?|remembered|forgets?|forgot|trusts?|hopes?|cares?|complains?|promises?|tries|tried"
)
"""Verbs of a person, which are not used after a noun of `SUBJECT`."""

WORDS = {
    r"strangers?": "untrusted, or third-party",
    r"likewise": "repeat the term",
    r"who(m|so)?ever": "name the role",
    r"somebody|nobody": "name the role",
    r"whatever": "for any, every",
    r"things?": "name it",
    r"by name": "explicitly, or nothing",
    r"(is|are|was|were) said|said once": "is logged, is printed",
    r"verdicts?": "diagnosis",
    r"judge[sd]?": "hang detector, or check",
    r"(the|a) boards?": "heartbeat store",
    r"fence[sd]?": "ownership token",
    r"eyes|sights?": "VisualPreprocessor, ObjectVisibility",
    r"refuse[sd]?|refusing|refusals?": "raises ValueError, is not supported",
    r"left out|leaves? out|leaving out": "skipped",
    r"the field's (way|step|numbers)": "HF Trainer baseline",
    r"foreign": "third-party predictions",
    r"aside": "temporary",
    r"what rows": "answer positions",
    r"merge nothing": "zero geometry",
    r"in the way": "blocking",
    r"bins": "scene groups",
    r"(?<!__)slots(?!__|=)": "digit tokens",
    r"VLM('s)? fronts?": "VLM frontend",
    r"visual[-_]only": "shortcut (training), 2D only (evaluation)",
    r"plain (pass|tokens|stream|visual|embeddings?|inputs?|answers?)": "shortcut",
    r"(the|a|mean|gap_every) gap(?! between)": "decode gap",
    r"last words": "error message",
    r"lives? on|knows nothing": "rephrase without personification",
    r"(?<!_)together\(\)": "raise_on_all_ranks",
    r"readings|(a|the|this|each|every|push|which) reading|reading of (Eq|the paper|W2R2)": "push term",
    r"look(s|ed|ing) (at|into)": "read, inspect",
    r"remembers?|remembered|forgets?|forgot|believes?": "stores, contains, lacks",
    r"(is|are|was|were) (not )?(told|asked)": "receives, is requested",
    r"(json|yaml|py|md|toml) (says|said|knows|tells)": "has",
    rf"({SUBJECT})s? ({VERBS})(?! (up|like))": "a verb for code: prints, has, reads, needs, waits for",
}
"""Regular expression of a word that is not used -> what to write instead."""

EXCEPTIONS = {
    "scripts/check_words.py": "the list itself",
    "w2r2_ds/demo/synthetic": "English sentences about rooms are data",
    "tests/demo/synthetic": "English sentences about rooms are data",
    "w2r2_ds/evaluation/protocols/scanqa.py": "words of the data set's normalisation table",
    "docs/measured": "recorded reports",
}
"""File or folder -> why it is not checked."""

_GROUPS = "|".join(f"(?P<w{i}>{word})" for i, word in enumerate(WORDS))
PATTERN = re.compile(rf"(?<![A-Za-z])(?:{_GROUPS})(?![A-Za-z])", re.IGNORECASE)


def files() -> Iterator[Path]:
    """Files to check, sorted by name."""
    for place in PLACES:
        path = ROOT / place
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            name = file.relative_to(ROOT).as_posix()
            skipped = any(name == exception or name.startswith(f"{exception}/") for exception in EXCEPTIONS)
            if file.is_file() and file.suffix in SUFFIXES and not skipped:
                yield file


def hits(text: str) -> Iterator[tuple[int, str, str]]:
    """Line number, word and replacement of every hit in `text`."""
    replacements = list(WORDS.values())
    for number, line in enumerate(text.splitlines(), start=1):
        for match in PATTERN.finditer(line):
            index = next(i for i in range(len(WORDS)) if match.group(f"w{i}"))
            yield number, match.group(), replacements[index]


def main(args: list[str] | None = None) -> int:
    """Check all files; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="counts per folder instead of an error")
    options = parser.parse_args(args)
    counts: Counter[str] = Counter()
    for file in files():
        name = file.relative_to(ROOT)
        for number, word, replacement in hits(file.read_text(encoding="utf-8")):
            counts["/".join(name.parts[: 2 if len(name.parts) > 2 else 1])] += 1
            if not options.report:
                print(f"{name}:{number}: {word} (use {replacement})")
    if options.report:
        for place, count in sorted(counts.items()):
            print(f"{count:5} {place}")
        print(f"{sum(counts.values()):5} in all")
        return 0
    return int(bool(counts))


if __name__ == "__main__":
    sys.exit(main())
