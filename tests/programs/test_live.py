"""What the live page serves, by the Prometheus that is installed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import requests

from dashboards import live, prometheus
from labs.harness.reports import pages, report
from labs.harness.storage.results import RunFolder
from serving.processes.ports import free_port
from serving.processes.process import Process
from tests.fake.conftest import needs_prometheus
from tests.unit.builders import write_run


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for module in (prometheus, live):
        monkeypatch.setattr(module, "HOME", tmp_path / "prometheus")
    return tmp_path / "prometheus"


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = write_run(tmp_path / "results")
    report.write(folder)
    pages.write(folder)
    return folder


def hostile(folder: RunFolder, home: Path) -> None:
    (home.parent / "secret").write_text("secret")
    (folder.path / "leak.svg").symlink_to(home.parent / "secret")
    (folder.path / "root").symlink_to("/")
    for name in ("index.html", "evil.js", "evil.svg.html", ".hidden.svg"):
        (folder.path / name).write_text("<script>alert(1)</script>")
    folder.path.joinpath("nested.svg").mkdir()


def served(home: Path) -> set[str]:
    return {p.name for p in (home / "web" / "reports").rglob("*") if not p.is_dir()}


def test_only_reports_are_served_and_no_link(folder: RunFolder, home: Path) -> None:
    hostile(folder, home)
    live.place(folder.path.parents[2])
    pictures = {p.name for p in folder.path.glob("*.svg") if p.is_file() and not p.is_symlink()}
    assert served(home) == {"report.md", "report.html", *pictures} - {".hidden.svg"}
    assert not any(p.is_symlink() for p in (home / "web").rglob("*"))


def test_a_run_that_is_reached_by_a_link_is_not_served(folder: RunFolder, home: Path) -> None:
    machine = folder.path.parents[1]
    (folder.path.parents[2] / "linked").symlink_to(machine)
    live.place(folder.path.parents[2])
    assert {p.name for p in (home / "web" / "reports").iterdir()} == {machine.name}


def test_a_report_that_came_later_is_served_too(folder: RunFolder, home: Path) -> None:
    live.place(folder.path.parents[2])
    shutil.rmtree(home / "web" / "reports")
    live.publish(folder.path)
    assert not (home / "web" / "reports").exists()  # nothing serves it
    (home / "web" / "reports").mkdir()
    live.publish(folder.path)
    live.publish(folder.path)
    assert "report.html" in served(home)


@pytest.fixture
def url(folder: RunFolder, home: Path) -> Iterator[str]:
    hostile(folder, home)
    live.place(folder.path.parents[2], pages.script_hashes())
    port = free_port()
    with Process("prometheus", prometheus.argv(port), log=home / "log") as process:
        assert prometheus.ready(f"http://127.0.0.1:{port}", lambda: process.returncode is None)
        yield f"http://127.0.0.1:{port}"


@needs_prometheus
def test_a_browser_is_told_which_scripts_may_run(url: str, folder: RunFolder) -> None:
    run = "/".join(folder.path.parts[-3:])
    for path in ("/user/", f"/user/reports/{run}/report.html", "/api/v1/query?query=1"):
        head = requests.get(url + path, timeout=10).headers
        policy = head["Content-Security-Policy"]
        scripts = policy.partition("script-src ")[2].partition(";")[0]
        assert scripts.split() == ["'self'", *(f"'{each}'" for each in pages.script_hashes())]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert head["X-Content-Type-Options"] == "nosniff"
    for path in ("leak.svg", "root/etc/passwd", "evil.js"):
        assert requests.get(f"{url}/user/reports/{run}/{path}", timeout=10).status_code == 404
    listed = requests.get(f"{url}/user/reports/{run}/index.html", timeout=10).text
    assert "alert" not in listed
    assert 'href="report.html"' in listed


@needs_prometheus
def test_another_sites_page_may_not_read_what_prometheus_says(url: str) -> None:
    for origin, allowed in (("http://evil.example", None), ("http://localhost:5173",) * 2):
        answer = requests.get(f"{url}/api/v1/query?query=1", headers={"Origin": origin}, timeout=10)
        assert answer.headers.get("Access-Control-Allow-Origin") == allowed


@needs_prometheus
def test_prometheus_listens_on_loopback_alone(url: str) -> None:
    port = int(url.rpartition(":")[2])
    sockets = [c.laddr for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    assert {address.ip for address in sockets if address and address.port == port} == {"127.0.0.1"}
