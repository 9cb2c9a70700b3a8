"""Pages in a browser: Debian's Chromium without a window, where there is one."""

import html
import json
import re
import shutil
import subprocess

import pytest
from report.test_page import cleansed, hostile, scanned, unfinished

from bdclean.report.formats import render

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: apt-get install chromium"),
]

RECORDS = {
    "scan": lambda: [scanned()],
    "cleanse": lambda: [cleansed()],
    "many": lambda: [cleansed(), scanned(), *unfinished()],
    "hostile": lambda: [hostile(), hostile()],
}
ASK = """
<title>?</title><iframe id="page" style="width: {width}px; height: 900px; border: 0" srcdoc="{page}"></iframe>
<script>
page.onload = () => {{
  const loaded = page.contentWindow.performance.getEntriesByType("resource").map(entry => entry.name);
  document.title = JSON.stringify([page.contentDocument.documentElement.scrollWidth, loaded]);
}};
</script>
"""


def chromium(tmp_path, *arguments):
    own = f"--user-data-dir={tmp_path / 'profile'}"
    return subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", own, *arguments],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("name", RECORDS)
def test_a_page_fits_its_window_says_nothing_to_the_console_and_fetches_nothing(name, width, tmp_path):
    shown = render(RECORDS[name](), "html")
    asking = tmp_path / "asking.html"
    asking.write_text(ASK.format(width=width, page=html.escape(shown)))
    done = chromium(tmp_path, "--virtual-time-budget=5000", "--dump-dom", asking.as_uri())
    (answer,) = re.findall(r"<title>(\[.*?\])</title>", done.stdout, re.S)[:1]
    wide, loaded = json.loads(html.unescape(answer))
    assert wide <= width
    assert not [name for name in loaded if not name.startswith("data:")]
    assert "CONSOLE" not in done.stderr


def test_a_page_is_printed_on_a4(tmp_path):
    page, printed = tmp_path / "page.html", tmp_path / "page.pdf"
    page.write_text(render([cleansed(), scanned()], "html"))
    chromium(tmp_path, f"--print-to-pdf={printed}", page.as_uri())
    boxes = re.findall(rb"/MediaBox \[0 0 ([\d.]+) ([\d.]+)\]", printed.read_bytes())
    assert boxes and all(abs(float(w) - 595) < 2 and abs(float(h) - 842) < 2 for w, h in boxes)
