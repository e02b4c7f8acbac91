"""What is sent to a Grafana, recorded by a stub of it: the shapes of requests, no more.

The stub knows uids and annotations as Grafana does, so a second push shows what is idempotent.
"""

from __future__ import annotations

import json
import threading
import tracemalloc
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from dashboards import boards, push
from dashboards.push import GrafanaError, Region
from labs.harness.cli.annotations import regions
from labs.harness.storage.results import RunFolder
from serving.processes.ports import free_port
from tests.unit.answering import Answering
from tests.unit.builders import write_run

TOKEN = "glsa_of_a_test"
REGION = Region(1000, 2000, ("lab:l", "run:r", "variant:a", "variant:b"), "A lab")


class Stub(ThreadingHTTPServer):
    """Remembers every request, and what was created."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.asked: list[tuple[str, str, Any]] = []
        self.tokens: set[str | None] = set()
        self.there: set[str] = set()
        self.annotations: list[dict[str, Any]] = []
        self.refuses = 0
        self.garbage: bytes | None = None  # the answer to everything

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def of(self, method: str, path: str) -> list[Any]:
        return [body for m, p, body in self.asked if (m, p) == (method, path)]


class Answer(Answering):
    server: Stub

    def answer(self) -> None:
        if self.server.garbage is not None:
            return self.reply(self.server.garbage, self.server.refuses or 200)
        body = self.asked() if int(self.headers.get("Content-Length") or 0) else None
        self.server.asked.append((self.command, self.path, body))
        self.server.tokens.add(self.headers.get("Authorization"))
        status, found = self.server.refuses or 200, self.found(body)
        if found is None and status == 200:
            status = 404
        self.reply(found if status == 200 else {"message": "no"}, status)

    do_GET = do_POST = do_PUT = answer

    def found(self, body: Any) -> Any:
        """None: not found."""
        there, notes = self.server.there, self.server.annotations
        path = self.path.partition("?")[0]
        if path == "/api/annotations" and self.command == "GET":
            return notes
        if path == "/api/annotations":
            notes.append({**body, "id": len(notes) + 1})
        elif self.command == "PUT" and path.startswith("/api/annotations/"):
            number = int(path.rpartition("/")[2])
            notes[number - 1] = {**body, "id": number}
        elif self.command == "GET":
            return {"uid": path.rpartition("/")[2]} if path in there else None
        elif path == "/api/datasources":
            there.add(f"{path}/uid/{body['uid']}")
        elif path == "/api/folders":
            there.add(f"{path}/{body['uid']}")
        return {"status": "success"}


@pytest.fixture
def grafana() -> Iterator[Stub]:
    stub = Stub()
    threading.Thread(target=stub.serve_forever, args=(0.02,), daemon=True).start()
    yield stub
    stub.shutdown()
    stub.server_close()


def pushed(grafana: Stub, *found: Region) -> Stub:
    grafana.asked.clear()
    push.push(f"{grafana.url}/", TOKEN, "http://127.0.0.1:9090", found)
    return grafana


def test_what_is_sent_the_first_time(grafana: Stub) -> None:
    pushed(grafana, REGION)
    assert grafana.tokens == {f"Bearer {TOKEN}"}
    (source,) = grafana.of("POST", "/api/datasources")
    assert source["uid"] == "inference-lab"
    assert source["type"] == "prometheus"
    assert source["url"] == "http://127.0.0.1:9090"
    assert source["jsonData"]["timeInterval"] == "1s"
    assert grafana.of("POST", "/api/folders") == [
        {"title": "Inference-serving lab", "uid": "inference-lab"}
    ]
    sent = grafana.of("POST", "/api/dashboards/db")
    assert {s["dashboard"]["uid"] for s in sent} == {b["uid"] for b in boards.written().values()}
    assert {(s["folderUid"], s["overwrite"]) for s in sent} == {("inference-lab", True)}
    assert {p["datasource"]["uid"] for s in sent for p in boards.panels(s["dashboard"])} == {
        source["uid"]
    }
    (note,) = grafana.of("POST", "/api/annotations")
    assert (note["time"], note["timeEnd"], note["text"]) == (1000, 2000, "A lab")
    assert note["tags"] == ["inference-lab", "lab:l", "run:r", "variant:a", "variant:b"]


def test_pushing_again_adds_nothing(grafana: Stub) -> None:
    pushed(grafana, REGION)
    pushed(grafana, REGION)
    assert grafana.of("POST", "/api/datasources") == []
    assert len(grafana.of("PUT", "/api/datasources/uid/inference-lab")) == 1
    assert grafana.of("POST", "/api/folders") == []
    assert grafana.of("POST", "/api/annotations") == []
    assert len(grafana.annotations) == 1


def test_a_region_that_changed_is_mended(grafana: Stub) -> None:
    pushed(grafana, REGION)
    pushed(grafana, Region(1000, 3000, REGION.tags, REGION.text))
    assert [note["timeEnd"] for note in grafana.annotations] == [3000]


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_token_is_one_sentence(grafana: Stub, status: int) -> None:
    grafana.refuses = status
    with pytest.raises(GrafanaError, match=rf"refused GRAFANA_TOKEN \({status}, .*\)") as caught:
        pushed(grafana)
    assert TOKEN not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("status", "says"), [(500, "failed"), (412, "did not accept")])
def test_another_refusal_is_one_sentence(grafana: Stub, status: int, says: str) -> None:
    grafana.refuses = status
    with pytest.raises(GrafanaError, match=says):
        pushed(grafana)


@pytest.mark.parametrize(
    ("url", "token", "says"),
    [
        ("http://127.0.0.1:{free}", TOKEN, "cannot be reached"),
        ("grafana:3000", TOKEN, "is not an address"),
        ("http://127.0.0.1:3000", "", "GRAFANA_TOKEN is not set"),
        ("http://me:secret@127.0.0.1:3000", TOKEN, "leave them out"),
        ("me:secret@127.0.0.1:3000", TOKEN, "leave them out"),
        ("http://me:sec/secret@127.0.0.1:3000", TOKEN, "leave them out"),
    ],
)
def test_what_is_missing_is_one_sentence(url: str, token: str, says: str) -> None:
    with pytest.raises(GrafanaError, match=says) as caught:
        push.push(url.format(free=free_port()), token, "http://127.0.0.1:9090", [])
    assert "secret" not in str(caught.value)


def test_a_finished_run_is_a_region_with_its_tags(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    (found,) = regions([folder], never)
    lab = folder.run().rebuilt_lab()
    assert found.own_tag == f"run:{folder.path.name}"
    assert found.tags[0] == f"lab:{lab.name}"
    assert {f"variant:{v.name}" for v in lab.variants} <= set(found.tags)
    assert 0 < found.end_ms - found.start_ms < 3_600_000
    (folder.path / "COMPLETE").unlink()
    assert regions([folder], never) == []


def test_a_damaged_run_is_named_and_left_out(tmp_path: Path) -> None:
    good, bad = write_run(tmp_path / "good"), write_run(tmp_path / "bad")
    (bad.path / "run.json").write_text("{")
    told: list[RunFolder] = []
    assert len(regions([bad, good], lambda folder, _: told.append(folder))) == 1
    assert told == [bad]


def never(folder: RunFolder, what: str) -> None:
    raise AssertionError(f"{folder.path}: {what}")


@pytest.mark.parametrize(
    "garbage",
    [b"[]", b"{}", b'"yes"', b"null", b"<html>a captive portal</html>", b"\xff", b"[" * 10**5],
)
def test_what_answers_garbage_is_no_grafana(grafana: Stub, garbage: bytes) -> None:
    grafana.garbage = garbage
    with pytest.raises(GrafanaError, match="http") as failed:
        push.push(grafana.url, TOKEN, "http://127.0.0.1:9090", [REGION])
    assert len(str(failed.value)) < 600


@pytest.mark.parametrize("status", [200, 400, 500])
def test_an_answer_without_end_is_not_kept(
    grafana: Stub, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(push, "MOST_ANSWER_BYTES", 10**5)
    grafana.garbage, grafana.refuses = b" " * 10**8, status
    tracemalloc.start()
    with pytest.raises(GrafanaError, match="100000 bytes"):
        push.push(grafana.url, TOKEN, "http://127.0.0.1:9090", [REGION])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10**7


@pytest.mark.parametrize("status", [200, 400, 401, 500])
def test_a_token_that_is_sent_back_is_not_shown(grafana: Stub, status: int) -> None:
    grafana.garbage, grafana.refuses = json.dumps({"message": f"no {TOKEN}"}).encode(), status
    with pytest.raises(GrafanaError) as failed:
        push.push(grafana.url, TOKEN, "http://127.0.0.1:9090", [REGION])
    assert TOKEN not in str(failed.value)


def test_nor_is_the_beginning_of_one_that_is_cut_off(grafana: Stub) -> None:
    long = "x" * (290 - len("Client Error 400: "))
    grafana.garbage, grafana.refuses = json.dumps({"message": f"{long} {TOKEN}"}).encode(), 400
    with pytest.raises(GrafanaError) as failed:
        push.push(grafana.url, TOKEN, "http://127.0.0.1:9090", [REGION])
    assert TOKEN[:6] not in str(failed.value)
