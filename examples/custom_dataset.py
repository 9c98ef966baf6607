"""Prepare a data set from your own questions about scenes in ScanNet's layout.

    python examples/custom_dataset.py QUESTIONS.jsonl --root data/scannet [--frames 8]

A line of QUESTIONS.jsonl is ``{"scene": "scene0000_00", "question": "How many chairs?", "answers": ["2", "two"]}``. The
script writes a file in ScanQA's format to a new folder, links the frames there, and runs ``prepare.py scanqa``, which
needs the colour images only. docs/guides/own-dataset.md shows how to train on the result.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from w2r2_ds.utils.files.json_io import read_jsonl

REPOSITORY = Path(__file__).resolve().parents[1]
REQUIRED = ("scene", "question", "answers")


def scanqa_entries(questions: Path) -> list[dict[str, object]]:
    """Entries of a ScanQA file, one per line of `questions`.

    Raises:
        ValueError: a line is no JSON object, or lacks one of the REQUIRED fields; names the file and the line.
    """
    entries: list[dict[str, object]] = []
    for number, record in read_jsonl(questions):
        missing = [key for key in REQUIRED if not record.get(key)]
        if missing:
            raise ValueError(f"{questions}, line {number}: no {', '.join(missing)}")
        entries.append(
            {
                "scene_id": record["scene"],
                "question_id": f"custom-{number}",
                "question": record["question"],
                "answers": record["answers"],
            }
        )
    return entries


def main(args: list[str] | None = None) -> int:
    """Write the annotations and prepare the data set; returns the exit code of prepare.py."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", type=Path)
    parser.add_argument("--root", type=Path, required=True, help="data root in ScanNet's layout")
    parser.add_argument("--out", type=Path, default=Path("runs/custom"), help="new data root")
    parser.add_argument("--frames", type=int, default=8, help="frames per sample")
    options = parser.parse_args(args)
    annotations = options.out / "ScanQA"
    annotations.mkdir(parents=True, exist_ok=True)
    frames = options.out / "posed_images"  # a link: the images are not copied
    if not frames.exists():
        frames.symlink_to((options.root / "posed_images").resolve())
    entries = scanqa_entries(options.questions)
    (annotations / "ScanQA_v1.0_train.json").write_text(json.dumps(entries, indent=1), encoding="utf-8")
    command = [sys.executable, str(REPOSITORY / "launchers" / "prepare.py"), "scanqa", "--root", str(options.out)]
    command += ["--splits", "[train]", "--frames.protocol", "uniform", "--frames.count", str(options.frames)]
    code = subprocess.run(command, check=False).returncode
    if code == 0:
        print(f"prepared: {options.out / 'prepared' / 'scanqa' / 'train'}")
    return code


if __name__ == "__main__":
    sys.exit(main())
