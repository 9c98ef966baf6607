"""Reports in headless Chromium: they draw, the 3D view turns, nothing is loaded, and injected markup stays text."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from diagnosis_files import write_diagnoses
from report_runs import MARKUP
from w2r2_ds.report.collect import read_run
from w2r2_ds.report.page import build_page

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.distributed,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium"),
]
# WebGL by software; without a sandbox, because tests may run as root.
ARGUMENTS = ["--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
DRAWN = "[...document.querySelectorAll('[data-figure]')].filter(e => e.querySelector('.main-svg')).length"
ROOM = ".room .plot"
PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}


class Page:
    """A page in the browser.

    Args:
        browser: the browser.
        file: HTML file.
        options: options of playwright's `new_context`.
    """

    def __init__(self, browser: Any, file: Path, **options: Any) -> None:
        self.context = browser.new_context(**options)
        self.page = self.context.new_page()
        self.problems: list[str] = []
        self.page.on("console", lambda text: self._add(text.type == "error", text.text))
        self.page.on("pageerror", lambda error: self._add(True, str(error)))
        self.page.on("dialog", lambda dialog: (self._add(True, "a dialog"), dialog.dismiss()))
        self.page.on("request", lambda request: self._add(not is_local(request.url), request.url[:100]))
        self.page.goto(file.as_uri())

    def _add(self, is_problem: bool, text: str) -> None:
        if is_problem:
            self.problems.append(text)

    def draw_room(self) -> None:
        """Scroll to the 3D view, which is drawn when it comes into view."""
        self.page.locator(ROOM).first.scroll_into_view_if_needed()
        self.page.wait_for_function(
            f"document.querySelector('{ROOM}').querySelector('canvas') !== null", timeout=60_000
        )

    def camera(self) -> dict[str, float]:
        """Position of the camera of the 3D view."""
        found: dict[str, float] = self.page.evaluate(f"document.querySelector('{ROOM}')._fullLayout.scene.camera.eye")
        return found


def is_local(url: str) -> bool:
    """Whether nothing but the page itself is loaded."""
    return url.startswith(("file:", "data:", "blob:"))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def file(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(build_page([read_run(finished_run, "margin")], samples=4, rooms=1))
    return path


def test_everything_is_drawn_and_the_room_turns(browser: Any, file: Path) -> None:
    page = Page(browser, file, viewport={"width": 1280, "height": 900})
    total = page.page.locator("[data-figure]").count()
    page.page.wait_for_function(f"{DRAWN} >= {total - 1}", timeout=60_000)
    page.draw_room()
    page.page.wait_for_function(f"{DRAWN} === {total}", timeout=60_000)
    before = page.camera()
    box = page.page.locator(ROOM).first.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.page.mouse.move(x, y)
    page.page.mouse.down()
    page.page.mouse.move(x + 120, y + 30, steps=6)
    page.page.mouse.up()
    page.page.wait_for_function(
        f"Math.abs(document.querySelector('{ROOM}')._fullLayout.scene.camera.eye.x - {before['x']}) > 0.05",
        timeout=30_000,
    )
    assert page.problems == []


@pytest.fixture(scope="module")
def diagnosed(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with all sections of a diagnosis, whose sample ids and folders contain markup."""
    run = tmp_path_factory.mktemp("diagnosed") / "run"
    run.mkdir()
    shutil.copy(finished_run / "config.yaml", run)
    write_diagnoses(run, [f"a{MARKUP}", "b"], data=f"prepared/{MARKUP}")
    path = run / "report.html"
    path.write_text(build_page([read_run(run, "run")], samples=0, rooms=0))
    return path


@pytest.mark.parametrize(
    "options",
    [{"viewport": {"width": 1280, "height": 900}}, {**PHONE, "color_scheme": "dark"}],
    ids=["desktop", "phone"],
)
def test_every_section_of_a_diagnosis_is_drawn(browser: Any, diagnosed: Path, options: dict[str, Any]) -> None:
    page = Page(browser, diagnosed, **options)
    page.page.wait_for_function(f"{DRAWN} === 5", timeout=60_000)
    # Plots with their marks: slopes of six numbers and two interventions, three clouds of 24 tokens, lines over layers.
    counts = page.page.evaluate(
        """[...document.querySelectorAll('[data-figure]')].map(
            e => [e.querySelectorAll('.point').length, e.querySelectorAll('.errorbar').length])"""
    )
    assert counts == [[12, 12], [72, 0], [16, 0], [8, 0], [8, 0]]
    images = page.page.evaluate(
        "[...document.querySelectorAll('.heat image')].map(e => e.getBoundingClientRect().width)"
    )
    assert len(images) == 2 and min(images) > 300
    assert page.page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert page.page.evaluate("window.injected") is None and page.page.locator("img").count() == 0
    assert MARKUP in page.page.locator("body").inner_text()
    assert page.problems == []


def test_a_phone_does_not_scroll_sideways(browser: Any, file: Path) -> None:
    page = Page(browser, file, **PHONE)
    page.page.wait_for_function(f"{DRAWN} > 3", timeout=60_000)
    widths = page.page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    assert widths == [390, 390] and page.problems == []
    # Text is at least 11 pixels high, also in the plots.
    sizes = page.page.evaluate(
        "[...document.querySelectorAll('.xtick text')].map(e => parseFloat(getComputedStyle(e).fontSize))"
    )
    assert sizes and min(sizes) >= 11


def test_dark_mode_follows_the_system(browser: Any, file: Path) -> None:
    """Also while the page is open; the text of the plots stays readable on the background."""

    def brightness() -> tuple[float, float]:
        script = """(() => {
            const sum = c => c.match(/[\\d.]+/g).slice(0, 3).map(Number).reduce((a, b) => a + b) / 765;
            const tick = document.querySelector('.xtick text');
            return [sum(getComputedStyle(document.body).backgroundColor), sum(getComputedStyle(tick).fill)];
        })()"""
        background, text = page.page.evaluate(script)
        return background, text

    page = Page(browser, file, color_scheme="light")
    page.page.wait_for_function(f"{DRAWN} > 3", timeout=60_000)
    light = brightness()
    page.page.emulate_media(color_scheme="dark")
    page.page.wait_for_timeout(500)
    dark = brightness()
    assert light[0] > 0.9 and light[1] < 0.5
    assert dark[0] < 0.2 and dark[1] > 0.5
    assert page.problems == []


def test_injected_markup_stays_text(browser: Any, hostile_run: Path, tmp_path: Path) -> None:
    file = tmp_path / "hostile.html"
    file.write_text(build_page([read_run(hostile_run, hostile_run.name)], samples=6, rooms=1))
    page = Page(browser, file)
    page.page.wait_for_function(f"{DRAWN} > 0", timeout=60_000)
    page.draw_room()
    assert page.page.evaluate("window.injected") is None
    assert page.page.locator("img").count() == 0 and page.page.locator("[onmouseover]").count() == 0
    assert MARKUP in page.page.locator("body").inner_text()
    assert page.problems == []
