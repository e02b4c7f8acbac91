"""The live page: the committed dashboards drawn by a browser, without a Grafana.

Prometheus itself serves it (its user assets, under /user/), so the page queries the server that it
came from, and no other server is needed.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

from dashboards import boards, palette
from dashboards.prometheus import HOME, Watch, watch, watching

PAGE = Path(__file__).with_name("page")


def start(port: int, results: Path) -> Watch:
    """Put the page in place and start the Prometheus that shows it. Raises PrometheusError."""
    place(results)
    return watch(port)


def place(results: Path) -> None:
    """Put the page where Prometheus serves it, unless a Prometheus of `make watch` is up.

    It links to the folders of runs, which are served with it.
    """
    if watching():
        return
    web = HOME / "web"
    shutil.rmtree(web, ignore_errors=True)
    shutil.copytree(PAGE, web, dirs_exist_ok=True)
    (web / "plotly.min.js").write_text(get_plotlyjs())
    (web / "reports").symlink_to(results)
    drawn = [json.loads(path.read_text()) for path in sorted(boards.FOLDER.glob("*.json"))]
    for panel in (panel for board in drawn for panel in boards.panels(board)):
        panel["needs"] = boards.NEEDS.get(panel["title"]) or _missing_after_import(panel)
    (web / "boards.json").write_text(json.dumps({"boards": drawn, "colours": palette.VARIANTS}))


def _missing_after_import(panel: dict[str, Any]) -> str | None:
    """Say what a panel lacks for an imported run; None where it asks for more than the engine's."""
    asks_engine = all("vllm:" in target["expr"] for target in panel["targets"])
    return "the engine's own series, which no file keeps" if asks_engine else None
