"""The report's pages as a reader gets them: without a network, in a real browser, wide, narrow and on paper."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape

import pytest

pytest.importorskip("matplotlib")

import report
from tests.report_helpers import write_study

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
CHROMIUM = next((path for name in NAMES if (path := shutil.which(name))), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason=f"no browser: looked for {', '.join(NAMES)}")
# Measures the page in frames of two widths from outside, so that the page stays as it is, its policy included.
PROBE = """<!DOCTYPE html><meta charset="utf-8"><title>probe</title>
<iframe id="wide" src="{page}" style="width:1280px;height:900px;border:0"></iframe>
<iframe id="narrow" src="{page}" style="width:390px;height:800px;border:0"></iframe>
<pre id="seen"></pre>
<script>
onload = () => {{
  const seen = {{}};
  for (const frame of document.querySelectorAll("iframe")) {{
    const doc = frame.contentDocument, root = doc.documentElement, win = frame.contentWindow;
    seen[frame.id] = {{
      title: doc.title, width: win.innerWidth, across: root.scrollWidth, height: root.scrollHeight,
      images: [...doc.images].map(i => [i.naturalWidth, i.clientWidth, i.alt.length]),
      tables: doc.querySelectorAll("table").length, headings: doc.querySelectorAll("h2").length,
      fetched: win.performance.getEntriesByType("resource").map(e => e.name),
      right: [...doc.querySelectorAll("td.number")].every(c => win.getComputedStyle(c).textAlign === "right"),
      lost: [...doc.querySelectorAll("nav a")].filter(a => !doc.getElementById(a.hash.slice(1))).length,
      font: parseFloat(win.getComputedStyle(doc.querySelector("td")).fontSize),
    }};
  }}
  document.getElementById("seen").textContent = JSON.stringify(seen);
}};
</script>
"""


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """The folder of a report, as the command writes it."""
    folder = tmp_path_factory.mktemp("out")
    assert report.main([str(write_study(tmp_path_factory.mktemp("study"))), "--out", str(folder)]) == 0
    return folder


def chromium(profile, *arguments):
    """What the browser writes; its own services stay off."""
    line = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
        "--disable-background-networking", "--allow-file-access-from-files", "--enable-logging=stderr",
        f"--user-data-dir={profile}", *arguments,
    ]  # fmt: skip
    done = subprocess.run(line, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, [text for text in done.stderr.splitlines() if "CONSOLE" in text]


def probe(folder, page):
    """The measures of a page in both frames, and the lines of the browser's console."""
    path = folder / f"probe_{page}"
    path.write_text(PROBE.format(page=page))
    dom, console = chromium(folder / "profile", "--dump-dom", path.as_uri())
    return json.loads(unescape(re.search(r'<pre id="seen">(.*?)</pre>', dom, re.DOTALL)[1])), console


def test_pages_are_whole_and_need_no_network(out):
    markdown, page = ((out / name).read_text() for name in ("report.md", "report.html"))
    figures = sorted(path.name for path in (out / "figures").iterdir())
    assert len(figures) == 10 and all(f"figures/{name}" in markdown for name in figures)
    assert page.count("data:image/png;base64,") == 10 and page.count("<img ") == page.count(' alt="') == 10
    assert not re.search(r"""(src|href|url)\s*[=(]\s*["']?\s*(https?:)?//""", page) and "<script" not in page
    assert page.count("<h1") == 1 and '<html lang="en">' in page and "Content-Security-Policy" in page
    assert page.count("<caption>") == page.count("<table") > 8 and "@media print" in page
    for text in ("41.0×", "optimizer.lr must be positive", "a card", "left no summary"):
        assert text in markdown and text in page


@needs_browser
def test_a_browser_shows_it_wide_and_narrow(out):
    seen, console = probe(out, "report.html")
    assert console == []
    for frame, width in (("wide", 1280), ("narrow", 390)):
        page = seen[frame]
        assert page["width"] == width and page["across"] <= width, frame  # tables scroll, the page does not
        assert page["title"] == "Sparton: heads compared" and page["headings"] == 13 and page["tables"] > 8
        assert len(page["images"]) == 10 and page["fetched"] == [] and page["lost"] == 0 and page["right"]
        for natural, shown, alt in page["images"]:
            assert natural > 1000 and 300 < shown <= width and alt > 40
        assert page["font"] >= 13 and page["height"] > 3000
    assert all(natural >= 1.9 * shown for natural, shown, _ in seen["wide"]["images"])  # sharp


@needs_browser
def test_the_probe_sees_what_it_should(tmp_path):
    """A page with a script's error, a picture from elsewhere and too wide a table is caught."""
    (tmp_path / "bad.html").write_text(
        '<title>x</title><table style="width:2000px"><tr><td class=number>1</table><img src="http://127.0.0.1:9/x.png">'
        '<script>console.error("broken")</script>'
    )
    seen, console = probe(tmp_path, "bad.html")
    assert any("broken" in line for line in console)
    assert seen["narrow"]["across"] > 390 and not seen["narrow"]["right"]
    assert seen["wide"]["fetched"] == ["http://127.0.0.1:9/x.png"] and seen["wide"]["images"][0][0] == 0


@needs_browser
def test_it_prints(out):
    paper = out / "report.pdf"
    chromium(out / "profile", "--no-pdf-header-footer", f"--print-to-pdf={paper}", (out / "report.html").as_uri())
    content = paper.read_bytes()
    assert content.startswith(b"%PDF") and 4 <= len(re.findall(rb"/Type\s*/Page\b", content)) <= 12
