"""The report in a real browser: on a desk and on a phone, light and dark, without a network and without scripts."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssgen_ds.report.page import write_report
from tests.support.browser import Browser, find_browser
from tests.support.report_folder import evaluate_run, make_run

LEFT_OUT = "left out: the tests of the report in a browser need Chromium (Debian: apt-get install chromium)"
WIDTHS = {"desk": 1100, "phone": 390}
SCHEMES = ("light", "dark")

# Elements wider than the page that are in nothing that scrolls.
TOO_WIDE = """[...document.body.querySelectorAll('*')].filter(e => {
  if (e.getBoundingClientRect().right <= innerWidth + 1) return false;
  for (let p = e; p !== document.body; p = p.parentElement)
    if (['auto', 'scroll', 'hidden'].includes(getComputedStyle(p).overflowX)) return false;
  return !e.closest('svg');
}).map(e => e.outerHTML.slice(0, 100))"""
# Figures: how many drawings they have, where these are and how large.
FIGURES = """[...document.querySelectorAll('figure')].map(f => {
  const drawings = [...f.querySelectorAll('svg')];
  const box = drawings[0].getBoundingClientRect();
  return [f.innerText.split('\\n')[0], drawings.length, box.x, box.y + scrollY, box.width, box.height];
})"""
# Texts of figures that stick out of them.
CUT_OFF = """[...document.querySelectorAll('figure svg')].flatMap(s => {
  const box = s.getBoundingClientRect();
  if (!box.width) return [];
  return [...s.querySelectorAll('text')].filter(t => {
    const own = t.getBoundingClientRect();
    return own.left < box.left - 2 || own.right > box.right + 2 || own.top < box.top - 2 || own.bottom > box.bottom + 2;
  }).map(t => t.textContent);
})"""
# Contrast of every kind of text against what is behind it (WCAG 2), the lowest first.
CONTRAST = """(() => {
  const rgb = c => c.match(/[\\d.]+/g).map(Number);
  const light = c => c.slice(0, 3).map(v => v / 255).map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const behind = e => { for (; e; e = e.parentElement) {
    const c = rgb(getComputedStyle(e).backgroundColor); if (c.length < 4 || c[3] > 0) return c; } };
  return [...document.querySelectorAll('p, li, dt, dd, th, td, h1, h2, h3, h4, mark, ins, del, .text, summary, a')]
    .filter(e => e.innerText).map(e => {
      const [a, b] = [light(rgb(getComputedStyle(e).color)), light(behind(e))].sort((x, y) => y - x);
      return [(a + .05) / (b + .05), e.outerHTML.slice(0, 80)];
    }).sort((x, y) => x[0] - y[0])[0];
})()"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = find_browser()
    if program is None:
        if os.environ.get("SSGEN_REQUIRE_BROWSER"):
            pytest.fail(LEFT_OUT)
        pytest.skip(LEFT_OUT)
    with Browser(program, tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run that was evaluated and whose gap was measured, with a warning and long words in it."""
    run_dir = make_run(tmp_path_factory.mktemp("run") / f"a_run_with_{'a_very_long_' * 8}name")
    evaluate_run(run_dir)
    (run_dir / "attempts.jsonl").write_text(f'{{"outcome": "failed", "reason": "/a/{"long/" * 40}path"}}\n')
    return write_report(run_dir)


def colours(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("where", WIDTHS)
def test_the_report_as_it_is_seen(browser: Browser, report: Path, where: str, scheme: str) -> None:
    width = WIDTHS[where]
    browser.open(report, width, scheme)
    assert browser.ask("document.documentElement.scrollWidth") == width, browser.ask(TOO_WIDE)
    assert browser.ask(TOO_WIDE) == []
    assert browser.ask(CUT_OFF) == []
    contrast, element = browser.ask(CONTRAST)
    assert contrast >= 4.5, element

    figures = browser.ask(FIGURES)
    assert {"Loss", "Self-generated tokens", "ROUGE-L", "Passes per round", "Where the gap is"} <= {
        f[0] for f in figures
    }
    pixels = colours(browser.screenshot())
    height = browser.ask("document.documentElement.scrollHeight")
    assert pixels.shape[:2] == (height, width)
    is_dark = scheme == "dark"
    assert (np.median(pixels) < 60) == is_dark and (np.median(pixels) > 200) == (not is_dark)
    for title, num_drawings, x, y, wide, high in figures:
        assert num_drawings == 1, f"{title}: drawn once, for every width and for light and dark"
        part = pixels[int(y) : int(y + high), int(x) : int(x + wide)]
        assert min(part.shape[:2]) > 150, title
        ink = np.abs(part.astype(int) - np.median(pixels, axis=(0, 1))).sum(axis=2) > 30
        assert 0.01 < ink.mean() < 0.7, f"{title}: lines and bands on the page's own ground"
        assert len(np.unique(part.reshape(-1, 3), axis=0)) > 20, title


def test_the_page_asks_for_nothing_and_says_nothing(browser: Browser, report: Path) -> None:
    browser.open(report, WIDTHS["desk"], "light")
    browser.screenshot()
    requests = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
    assert requests == [report.resolve().as_uri()], "the page itself and nothing else"
    said = [e for e in browser.events if e["method"] in ("Log.entryAdded", "Runtime.consoleAPICalled")]
    assert said == []


def test_scripts_and_pictures_are_refused_even_if_one_gets_in(browser: Browser, report: Path) -> None:
    """What a model wrote is escaped; should that ever fail, the page's own policy stands."""
    infected = report.with_name("infected.html")
    bad = "<script>document.title = 'bad'</script><img src='file:///etc/hostname'>"
    infected.write_text(report.read_text(encoding="utf-8").replace("<header>", f"{bad}<header>"), encoding="utf-8")
    browser.open(infected, WIDTHS["desk"], "light")
    assert browser.ask("document.title") != "bad"
    said = " ".join(e["params"]["entry"]["text"] for e in browser.events if e["method"] == "Log.entryAdded")
    assert said.count("Content Security Policy") >= 2, said
