"""Draw the README's picture of a report: the top of a run's page, with numbered notes on it.

    .venv/bin/python -m docs.annotated_report [results/<machine>/<lab>/<run>]

writes `docs/report.png` with headless Chromium (`apt-get install chromium`), and without a run only
where the page of the run that it shows has changed; `make readme` calls it so. The notes are placed
beside what they point at, wherever it stands on the page.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from labs.harness.reports import pages
from labs.harness.storage.results import open_run
from serving import atomic
from tests.browser import Page, browser, find

OUT = Path(__file__).with_name("report.png")
ROOT = OUT.parents[1]
DATA = '<script type="application/json" id="data">'
WIDTH, HEIGHT = 1280, 1000  # of the window; the picture ends below the claims
COLOURS = 64  # of the palette that keeps the file small
MARGIN = "<style>body { margin: 0; max-width: 60rem }</style></head>"  # right of it stand the notes
NOTES = {
    "h1": "The lab, and the machine it ran on",
    "nav": "The parts of the report; the last ones say how it was measured and what weakens it",
    "#the-answer h2": "Your questions, answered in plain words from this run",
    "#claims": "What was predicted (shaded: where it holds), and what was measured (dots)",
}  # what a note points at -> what it says
END = "document.querySelector('#claims').closest('figure').getBoundingClientRect().bottom + scrollY"
PLACE_NOTES = """
for (const [index, [selector, words]] of Object.entries(NOTES).entries()) {
  const note = document.createElement("div");
  const [number, text] = [document.createElement("b"), document.createElement("span")];
  number.textContent = index + 1;
  text.textContent = words;
  const top = document.querySelector(selector).getBoundingClientRect().top + scrollY;
  note.style.cssText = `position: absolute; left: 61rem; width: 17.5rem; top: ${top}px;
    display: flex; gap: .6rem; align-items: start; padding: .4rem .7rem .4rem .4rem;
    background: #fff4d6; border: 2px solid #d55e00; border-radius: 1rem; color: #1b1f24;
    line-height: 1.35`;
  number.style.cssText = `background: #d55e00; color: #fff; border-radius: 50%; flex: 0 0 1.6em;
    text-align: center; line-height: 1.6em`;
  note.append(number, text);
  document.body.append(note);
}
"""


def draw(run: Path) -> Path:
    """Write the picture of a run's page; raises LabError where there is no such run."""
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        html = pages.page(open_run(run))
        annotated = atomic.write(home / "report.html", html.replace("</head>", MARGIN, 1))
        with browser(home / "profile") as chromium:
            page = Page(chromium, WIDTH, HEIGHT)
            page.open(annotated)
            page.wait("!!document.querySelector('#claims .main-svg')")
            page.js(f"{{ const NOTES = {json.dumps(NOTES)}; {PLACE_NOTES} }}")
            page.picture(home / "page.png")
            end = int(page.js(END))
        image = Image.open(io.BytesIO((home / "page.png").read_bytes())).convert("RGB")
    about = PngInfo()
    about.add_text("run", os.path.relpath(run, ROOT))
    about.add_text("shows", digest(html))
    image = image.crop((0, 0, image.width, end))
    image.quantize(COLOURS, dither=Image.Dither.NONE).save(OUT, optimize=True, pnginfo=about)
    return OUT


def digest(html: str) -> str:
    """Identify what the picture shows of a page: its text, its claims, and the notes."""
    top = html[html.index("<body") : html.index("<noscript><figure")]
    claims = json.loads(html.split(DATA)[1].split("</script>")[0])["claims"]
    return hashlib.sha256(json.dumps([top, claims, NOTES]).encode()).hexdigest()


def drawn() -> tuple[str, str]:
    """Return the path of the run whose page the picture shows, and the digest of what it shows."""
    with Image.open(OUT) as image:
        return image.info["run"], image.info["shows"]


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(draw(Path(sys.argv[1])))
    else:
        name, shows = drawn()
        run = ROOT / name
        if shows != digest(pages.page(open_run(run))):
            print(draw(run) if find() else f"{OUT} is out of date: install chromium to draw it")
