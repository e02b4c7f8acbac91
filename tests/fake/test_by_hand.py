"""Load by hand: Locust's own web UI obeys the reader's browser, and no other site's page."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import requests

from serving.processes.ports import free_port
from tests.fake.conftest import Reader, fake_engine


def test_only_a_page_of_this_machine_starts_a_load(reader: Reader, tmp_path: Path) -> None:
    log, port = tmp_path / "log.jsonl", free_port()
    page = f"http://127.0.0.1:{port}"
    load = {"user_count": "2", "spawn_rate": "2"}

    def posted(**head: str) -> requests.Response:
        return requests.post(f"{page}/swarm", load, headers=head, timeout=10)

    with fake_engine(log, "--step-s", ".01") as url:
        command = reader.types(
            "locust", LAB="continuous-batching", ENDPOINT=url, WEB_PORT=str(port)
        )
        command.until("Locust at")
        assert "Locust" in requests.get(page, timeout=10).text
        assert requests.get(page, headers={"Host": "evil.example"}, timeout=10).status_code == 421
        assert posted(Origin="http://evil.example").status_code == 403
        assert posted(Origin=page).json()["success"]
        deadline = time.monotonic() + 60
        while requests.get(f"{page}/stats/requests", timeout=10).json()["total_rps"] == 0:
            assert time.monotonic() < deadline, command.said
            time.sleep(0.1)
        command.process.send_signal(signal.SIGINT)
        command.wait()
    assert len(log.read_text().splitlines()) > 1  # the first asked whether it streams
