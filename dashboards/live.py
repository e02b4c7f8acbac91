"""The live page: the committed dashboards drawn by a browser, without a Grafana.

Prometheus itself serves it (its user assets, under /user/), so the page queries the server that it
came from, and no other server is needed. Beside it lie the reports of recorded runs: links to
regular files of known names, never to folders, so nothing else of the results is served. A policy
in every answer's head lets a browser run the scripts of this checkout alone, whatever a report that
came from elsewhere holds.
"""

from __future__ import annotations

import json
import re
import shutil
import stat
from collections.abc import Sequence
from pathlib import Path

from plotly.offline import get_plotlyjs

from dashboards import boards, palette
from dashboards.prometheus import HOME, Watch, watch, watching, write_headers

PAGE = Path(__file__).with_name("page")
SERVED = re.compile(r"report\.(?:md|html)|reproduction\.md|[a-z][a-z0-9-]*\.svg")


def start(port: int, results: Path, script_hashes: Sequence[str] = ()) -> Watch:
    """Put the page in place and start the Prometheus that shows it. Raises PrometheusError."""
    place(results, script_hashes)
    return watch(port)


def place(results: Path, script_hashes: Sequence[str] = ()) -> None:
    """Put the page where Prometheus serves it, unless a Prometheus of `make watch` is up.

    `script_hashes` are those of the scripts within reports, as a content security policy has them.
    """
    if watching():
        return
    web = HOME / "web"
    shutil.rmtree(web, ignore_errors=True)
    write_headers(script_hashes)
    shutil.copytree(PAGE, web, dirs_exist_ok=True)
    (web / "plotly.min.js").write_text(get_plotlyjs())
    (web / "reports").mkdir()
    for manifest in results.glob("*/*/*/run.json"):
        publish(manifest.parent)
    drawn = [json.loads(path.read_text()) for path in sorted(boards.FOLDER.glob("*.json"))]
    for panel in (panel for board in drawn for panel in boards.panels(board)):
        panel["needs"] = boards.NEEDS.get(panel["title"])
    (web / "boards.json").write_text(json.dumps({"boards": drawn, "colours": palette.VARIANTS}))


def publish(run: Path) -> None:
    """Put the report of a run beside the page, where there is one; it is no copy on the disk.

    The run lies in `results/<machine>/<lab>/<run>`. A file that is a link, or has a name that no
    report has, is left out.
    """
    reports = HOME / "web" / "reports"
    if not reports.is_dir() or any(place.is_symlink() for place in (run, *run.parents[:2])):
        return
    for path in run.iterdir():
        if not SERVED.fullmatch(path.name) or not stat.S_ISREG(path.lstat().st_mode):
            continue
        published = reports.joinpath(*run.parts[-3:], path.name)
        published.parent.mkdir(parents=True, exist_ok=True)
        published.unlink(missing_ok=True)
        try:
            published.hardlink_to(path)
        except OSError:  # on another disk
            shutil.copyfile(path, published, follow_symlinks=False)
