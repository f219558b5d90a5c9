"""The pages in a real browser: headless Chromium, two widths, light and dark."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, Browser
from made_run import make_run, many_tasks

from postnas.files import write_json
from postnas.report.compare import write_comparison
from postnas.report.html import write_report

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed to open the page in")
WIDTHS = (390, 1280)
VIEWS = [(page, width, scheme) for page in ("report", "compare") for width in WIDTHS for scheme in ("light", "dark")]

# Every axis of every plot: its name, and whether its ticks are numbers. matplotlib draws an axis as a group
# whose ticks are groups and whose name is a text beside them.
AXES = """[...document.querySelectorAll('figure > svg')].map(svg => ({
  label: svg.getAttribute('aria-label'),
  axes: [...svg.querySelectorAll('g[id*="matplotlib.axis_"]')].map(axis => ({
    name: [...axis.children].filter(g => g.id.includes('text_')).map(g => g.textContent.trim()).join(' '),
    numbers: [...axis.children].filter(g => /tick_/.test(g.id)).map(g => g.textContent.trim()).filter(t => t)
      .every(t => /^[−-]?[\\d.,]+[kMGK]?$/.test(t)),
  })),
}))"""
# Where a box reaches beyond the window, unless something around it scrolls.
OUTSIDE = """[...document.querySelectorAll('body *')].filter(node => {
  if (node.closest('.scroll, pre, svg')) return false;
  const box = node.getBoundingClientRect();
  return box.right > innerWidth + 0.5 || box.left < -0.5;
}).map(node => node.tagName + ' ' + node.className)"""
# How far from the paper's the colours of text are, by the contrast that WCAG defines.
CONTRAST = """(() => {
  const light = colour => {
    const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
      .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const paper = light(getComputedStyle(document.body).backgroundColor);
  const of = node => {
    const text = light(node.tagName === 'text' ? getComputedStyle(node).fill : getComputedStyle(node).color);
    return (Math.max(text, paper) + 0.05) / (Math.min(text, paper) + 0.05);
  };
  return Math.min(...[...document.querySelectorAll('h1, p, td, figcaption, svg text')].map(of));
})()"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A report with about thirty tasks, and three such runs compared, the third without a bench."""
    folder = tmp_path_factory.mktemp("runs")
    runs = [make_run(folder / name) for name in ("one", "two", "three-with-a-rather-long-name-of-its-own")]
    for number, run in enumerate(runs):
        write_json(run / "eval.json", many_tasks(number))
    (runs[2] / "bench.json").unlink()
    return {"report": write_report(runs[0]), "compare": write_comparison(runs, folder / "compare.html")}


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    found = Browser(tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


@pytest.mark.parametrize(("name", "width", "scheme"), VIEWS)
def test_page_opens(browser: Browser, pages: dict[str, Path], name: str, width: int, scheme: str) -> None:
    page = pages[name]
    browser.open(page, width, scheme)
    assert [event["request"]["url"] for event in browser.seen("Network.requestWillBeSent")] == [page.as_uri()]
    assert browser.seen("Log.entryAdded") == browser.seen("Runtime.consoleAPICalled") == []
    assert browser.seen("Runtime.exceptionThrown") == []
    assert browser.run("innerWidth") == width
    assert browser.run("document.documentElement.scrollWidth <= innerWidth")
    assert browser.run(OUTSIDE) == []
    assert browser.run("matchMedia('(prefers-color-scheme: dark)').matches") == (scheme == "dark")
    assert browser.run(CONTRAST) >= 3


@pytest.mark.parametrize("name", ["report", "compare"])
def test_every_axis_has_a_name_and_a_unit(browser: Browser, pages: dict[str, Path], name: str) -> None:
    browser.open(pages[name], 1280, "light")
    plots: list[dict[str, Any]] = browser.run(AXES)
    assert len(plots) == {"report": 12, "compare": 9}[name]
    for plot in plots:
        assert plot["label"]
        assert len(plot["axes"]) >= 2
        for axis in plot["axes"]:
            assert axis["name"], plot
            assert ", " in axis["name"] or not axis["numbers"], axis


def test_text_of_plots_can_be_read_on_a_phone(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["report"], 390, "light")
    heights = browser.run(
        "[...document.querySelectorAll('svg text')].map(t => parseFloat(getComputedStyle(t).fontSize) * "
        "t.ownerSVGElement.getBoundingClientRect().width / t.ownerSVGElement.viewBox.baseVal.width)"
    )
    assert min(heights) >= 9 and len(heights) > 100


def test_a_page_that_asks_somebody_is_seen(browser: Browser, tmp_path: Path) -> None:
    """The checks above are able to fail."""
    page = tmp_path / "bad.html"
    page.write_text("<img src='other.png'><script>missing()</script><div style='width:3000px'>x</div>")
    browser.open(page, 390, "light")
    assert len(browser.seen("Network.requestWillBeSent")) == 2
    assert browser.seen("Runtime.exceptionThrown")
    assert browser.run(OUTSIDE) == ["DIV "]
