"""Make docs/figures/report_{room,samples,causality}.png from a run: ``python docs/scripts/report_pictures.py RUN``.

RUN is the folder of a run, or that of the demo (runs/demo). The pictures are taken in headless Chromium (playwright, of
the extra ``dev``; ``apt-get install chromium``, or its path in CHROMIUM), and have the same size for every run.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

from w2r2_ds.report.collect import CONFIG, read_run
from w2r2_ds.report.page import build_page

FIGURES = Path(__file__).parents[2] / "docs" / "figures"
# WebGL by software, so that a 3D view is the same with any GPU; without a sandbox, which containers do not have.
ARGUMENTS = ["--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
WINDOW = {"width": 960, "height": 900}
STYLE = """
.cards { grid-template-columns: repeat(3, 1fr) !important; }
article { height: 318px; overflow: hidden; }
article:nth-child(n + 4), article dl, article > .note { display: none; }
.question { max-height: 4.5em; overflow: hidden; }
.diagnosed { grid-template-columns: 1fr !important; }
nav { position: static !important; }
"""
"""Changes of the page for the pictures: one row of three samples of equal height, without their texts of answers."""
PICTURES = {
    "room": (".room .plot", "w2r2 evaluate, on a grounding set whose data are on this machine"),
    "samples": (".cards", "w2r2 evaluate, on a set whose data are on this machine"),
    "causality": ("#causality ~ .runs .diagnosed figure", "w2r2 diagnose"),
}
"""Picture -> element of the page, and the command whose results it needs."""


def find_run(folder: Path) -> tuple[Path, list[Path]]:
    """Folder of the run, and folders of its results: the demo has its run in ``train``, and the results beside it."""
    if not (folder / CONFIG).is_file() and (folder / "train" / CONFIG).is_file():
        return folder / "train", [folder]
    return folder, []


def take_pictures(page: Any, out: Path) -> list[str]:
    """Write the pictures that the page has; returns the names of the others."""
    missing = []
    for name, (selector, _) in PICTURES.items():
        element = page.locator(selector).first
        if not page.locator(selector).count():
            missing.append(name)
            continue
        element.scroll_into_view_if_needed()
        if page.locator(f"{selector}[data-figure], {selector} [data-figure]").count():
            # 3D views are drawn when they come into view.
            element.locator("xpath=descendant-or-self::*[contains(@class, 'main-svg')]").first.wait_for(
                state="attached"
            )
            page.wait_for_timeout(3000)
        reduce(element.screenshot(), out / f"report_{name}.png")
    return missing


def reduce(png: bytes, file: Path) -> None:
    """Write a picture with a palette, which is a third as large."""
    with Image.open(io.BytesIO(png)) as image:
        image.convert("RGB").quantize(256).save(file, optimize=True)
    print(f"{file}: {file.stat().st_size} bytes")


def main(args: list[str] | None = None) -> int:
    """Build the report of a run and take the pictures; returns 1 if some have no results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, default=FIGURES)
    options = parser.parse_args(args)
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        sys.exit("no Chromium: apt-get install chromium, or set CHROMIUM to its path.")
    run, results = find_run(options.run)
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary, sync_playwright() as driver:
        file = Path(temporary) / "report.html"
        file.write_text(build_page([read_run(run, run.name, results)], samples=8, rooms=1), encoding="utf-8")
        browser = driver.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        page = browser.new_page(viewport=WINDOW, device_scale_factor=1.5, color_scheme="light")
        page.goto(file.as_uri())
        page.add_style_tag(content=STYLE)
        missing = take_pictures(page, options.out)
        browser.close()
    for name in missing:
        print(f"no picture report_{name}.png: the run has no results of {PICTURES[name][1]}", file=sys.stderr)
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
