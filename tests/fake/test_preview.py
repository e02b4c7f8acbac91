"""The dashboards drawn by Grafana's own components, from a Prometheus that has followed a run.

`make preview` fetches those components first; where they are not, these tests are skipped.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import pytest

from dashboards import boards
from labs.harness.storage.recorded import Run
from serving.processes.ports import free_port
from tests.browser import Page, browser, find
from tests.fake.conftest import LABS_WITH_FAKE_MODELS, needs_prometheus, reading
from tests.real import may_be_empty

PREVIEW = boards.FOLDER.parent / "preview"
VITE = PREVIEW / "node_modules" / "vite" / "bin" / "vite.js"
pytestmark = [
    needs_prometheus,
    pytest.mark.skipif(find() is None, reason="no chromium: `apt-get install chromium`"),
    pytest.mark.skipif(shutil.which("node") is None, reason="no node: it needs Node 20 or later"),
    pytest.mark.skipif(
        not VITE.exists(), reason="Grafana's components are not here: `make preview`"
    ),
]

BRIEF = (
    "warmup_s=0.5 window_s=1.5 repeats=2 most_repeats=0 requests=256"
    " claims.static.treatment.load=concurrent:4"
    ' claims.static.baseline.load=waves:4 workloads.fixed.loads=["concurrent:4"]'
    ' workloads.exponential.loads=["concurrent:4","waves:4"]'
    " workloads.exponential.output_tokens.mean_tokens=12"
    " workloads.exponential.output_tokens.max_tokens=48"
)
DRAWN = """[...document.querySelectorAll('[data-panel]')].map(panel => [
  panel.dataset.panel, panel.dataset.state,
  panel.querySelector('canvas, svg > g rect, [role=row] [role=gridcell]') !== null])"""


@dataclass(frozen=True)
class Previewed:
    url: str
    run: Run


@pytest.fixture(scope="module")
def previewed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Previewed]:
    """Someone watches a lab on the fake engine, and the preview asks their Prometheus."""
    home = tmp_path_factory.mktemp("previewed")
    built = home / "built"
    vite = ["node", str(VITE)]
    outside = ["--outDir", str(built)]
    subprocess.run(
        [*vite, "build", *outside, "--emptyOutDir"], cwd=PREVIEW, check=True, capture_output=True
    )
    with reading(home / "reader") as someone:
        prometheus, port = free_port(), free_port()
        assert someone.types("watch", PORT=str(prometheus)).wait() == 0
        try:
            command = someone.types(
                "run", "continuous-batching", QUICK="1", SET=BRIEF, program=LABS_WITH_FAKE_MODELS
            )
            assert command.wait() == 0, command.said
            assert someone.types("stop").wait() == 0  # a fresh one sees the figures at once
            assert someone.types("watch", PORT=str(prometheus)).wait() == 0
            environment = {
                "PATH": str(Path(shutil.which("node") or "").parent),
                "LABS_PROMETHEUS_URL": f"http://127.0.0.1:{prometheus}",
                "LABS_PREVIEW_PORT": str(port),
            }
            with subprocess.Popen(
                [*vite, "preview", *outside], cwd=PREVIEW, env=environment, text=True,
                stdout=subprocess.PIPE,
            ) as preview:  # fmt: skip
                try:
                    assert preview.stdout
                    assert any("Local" in line for line in preview.stdout)
                    yield Previewed(f"http://127.0.0.1:{port}", command.folder.run())
                finally:
                    preview.terminate()
        finally:
            someone.types("stop").wait()


@pytest.mark.parametrize("board", boards.BOARDS)
def test_every_panel_is_seen_with_data(previewed: Previewed, tmp_path: Path, board: str) -> None:
    """Or is empty for the reason that is named."""
    run = previewed.run
    start = datetime.fromisoformat(run.started_at).timestamp()
    asked = f"board={board}&lab={run.lab['name']}&from={start:.0f}"
    every = len(boards.panels(boards.written()[board]))
    with browser(tmp_path / "profile") as chromium:
        page = Page(chromium, 1400, 1000)
        page.open(f"{previewed.url}/?{asked}")
        state = "[...document.querySelectorAll('[data-panel]')].map(p => p.dataset.state)"
        page.wait(f"({state}).length === {every} && !({state}).includes('waiting')")
        page.size(1400, page.js("document.documentElement.scrollHeight"))  # tables draw what shows
        page.wait(f"({DRAWN}).some(([,, seen]) => seen)")
        found = {title: (state, seen) for title, state, seen in page.js(DRAWN)}
        expected = may_be_empty(run)
        wrong = {
            title: shown
            for title, shown in found.items()
            if (shows := expected.get(title, True)) is not None and shown != ("drawn", shows)
        }
        assert not wrong
        assert page.errors == []
