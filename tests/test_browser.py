"""The page in a real browser, at the widths of a phone, a tablet and a desk, light and dark: nothing is cut or fetched.

The pictures are left in the folder that the variable ANCHORVEC_PICTURES names, for who wants to look at them.
"""

import os
import shutil
from pathlib import Path

import pytest

from anchorvec.commands.report import report
from comparisons import write_comparison

pytestmark = pytest.mark.browser

WIDTHS = {"phone": 360, "tablet": 768, "desk": 1280}

CUT = """() => {
  const cut = [];
  const wide = document.documentElement.scrollWidth - window.innerWidth;
  if (wide > 0) cut.push(`the page is ${wide} px wider than the window`);
  const scrolls = element => {
    for (let e = element; e && e !== document.body; e = e.parentElement)
      if (["auto", "scroll"].includes(getComputedStyle(e).overflowX)) return true;
    return false;
  };
  for (const element of document.querySelectorAll("body *")) {
    const text = [...element.childNodes].some(n => n.nodeType === Node.TEXT_NODE && n.textContent.trim());
    if (!text || element.closest("script, style, svg defs")) continue;
    const style = getComputedStyle(element);
    const box = element.getBoundingClientRect();
    if (style.display === "none" || style.visibility === "hidden" || !box.width) continue;
    if (style.position === "absolute" && box.width <= 2) continue;  // for screen readers alone
    const words = `${element.tagName}: ${element.textContent.trim().slice(0, 40)}`;
    const svg = element.closest("svg");
    if (!svg && element.scrollWidth > element.clientWidth + 1 && style.overflowX === "hidden")
      cut.push(`cut in its box: ${words}`);
    if (svg) {
      const frame = svg.getBoundingClientRect();
      const aside = box.left < frame.left - 1 || box.right > frame.right + 1;
      if (aside || box.top < frame.top - 1 || box.bottom > frame.bottom + 1) cut.push(`outside its chart: ${words}`);
    }
    if (element.closest(".skip")) continue;  // shown when it has the focus
    if ((box.left < -1 || box.right > window.innerWidth + 1) && !scrolls(element))
      cut.push(`outside the window: ${words}`);
  }
  return cut;
}"""
"""JavaScript that lists the texts which a reader cannot see in whole, and cannot reach by scrolling in their box."""

CONTRAST = """() => {
  const parse = text => (text.match(/[\\d.]+/g) || []).map(Number);
  const light = ([r, g, b]) => {
    const part = v => ((v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * part(r) + 0.7152 * part(g) + 0.0722 * part(b);
  };
  const behind = element => {
    for (let e = element; e; e = e.parentElement) {
      const found = parse(getComputedStyle(e).backgroundColor);
      if (found.length === 3 || found[3] === 1) return found;
    }
    return [255, 255, 255];
  };
  const weak = [];
  for (const element of document.querySelectorAll("body *")) {
    const text = [...element.childNodes].some(n => n.nodeType === Node.TEXT_NODE && n.textContent.trim());
    if (!text || element.closest("script, style")) continue;
    const style = getComputedStyle(element);
    if (!element.getBoundingClientRect().width) continue;
    const color = parse(element.closest("svg") ? style.fill : style.color);
    if (color.length < 3) continue;
    const [a, b] = [light(color), light(behind(element))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) weak.push(`${ratio.toFixed(1)}: ${element.tagName}: ${element.textContent.trim().slice(0, 40)}`);
  }
  return weak;
}"""
"""JavaScript that lists the texts with less contrast than 4.5 to 1 (WCAG 2.2, AA)."""


@pytest.fixture(scope="module")
def browser():
    """Chromium, without a window: that of the system, or else playwright's own."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = shutil.which("chromium") or shutil.which("google-chrome")
        started = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    """The page about a comparison of eight arms, with long names, of which one failed with a seed."""
    folder = tmp_path_factory.mktemp("comparison")
    arms = ["e5", "echo", "llm2vec", "llama2vec", "gritlm", "nv-embed", "anchor", "stage_one.learning_rate=3e-4"]
    failing = {"echo": "OutOfMemoryError: tried to allocate 3 GB on a machine with 2 GB of free memory"}
    write_comparison(folder / "arms", arms, failing=failing)
    report(folder / "arms", folder / "page.html")
    return folder / "page.html"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_is_whole(browser, page_file, tmp_path, width, scheme):
    """No error in its console, no request, no text that is cut or hard to read; a picture is taken."""
    page = browser.new_page(viewport={"width": WIDTHS[width], "height": 900}, color_scheme=scheme)
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(page_file.as_uri())
    page.wait_for_load_state("networkidle")
    pictures = Path(os.environ.get("ANCHORVEC_PICTURES") or tmp_path)
    pictures.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=pictures / f"{width}-{scheme}.png", full_page=True)
    cut, weak = page.evaluate(CUT), page.evaluate(CONTRAST)
    page.close()
    assert said == []
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []
    assert cut == []
    assert weak == []


def test_the_page_prints(browser, page_file, tmp_path):
    """On paper it has dark letters on white, and no text is cut."""
    page = browser.new_page(viewport={"width": 794, "height": 1123}, color_scheme="dark")
    page.goto(page_file.as_uri())
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.documentElement).colorScheme") != "dark"
    assert page.evaluate(CUT) == []
    page.pdf(path=tmp_path / "page.pdf", format="A4")
    page.close()
    assert (tmp_path / "page.pdf").stat().st_size > 10_000
