"""The pages as text: what is on them, and what cannot get onto them."""

from __future__ import annotations

import base64
import hashlib
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from plotly.offline import get_plotlyjs

from labs import LABS
from labs.harness.derived.summarize import summarise
from labs.harness.reports import chart_data, html, pages, report, tables
from labs.harness.reports.document import Figure, plain_text
from labs.harness.site import site
from labs.harness.storage.recorded import TrialResult
from labs.harness.storage.results import RunFolder
from labs.harness.storage.writing import write_json
from loadtests import records
from tests.unit.builders import make_record, make_summary

LIBRARY, IN_ITS_PLACE = get_plotlyjs(), "the library"
HOSTILE = "</script><script>hacked()</script><img src=x onerror=hacked()>[a](javascript:hacked())"


class Seen(HTMLParser):
    """Every tag with its attributes, the text of scripts and styles, and what a reader reads.

    Plotly's library, of megabytes, is not parsed: `IN_ITS_PLACE` is, exactly where it stands.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.code: list[str] = []
        self.read = ""
        self._in = ""
        self.feed(text.replace(LIBRARY, IN_ITS_PLACE))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {k: v or "" for k, v in attrs}))
        self._in = tag
        if tag in ("script", "style"):
            self.code.append("")

    def handle_endtag(self, tag: str) -> None:
        self._in = ""

    def handle_data(self, data: str) -> None:
        if self._in in ("script", "style"):
            self.code[-1] += data
        else:
            self.read += data

    def attributes(self, name: str) -> list[str]:
        return [attrs[name] for _, attrs in self.tags if name in attrs]

    @property
    def data(self) -> dict[str, Any]:
        (text,) = (c for c in self.code if c.startswith('{"'))
        found: dict[str, Any] = json.loads(text)
        return found


def written(folder: RunFolder) -> Seen:
    summarise(folder)
    report.write(folder)
    return Seen(pages.write(folder).read_text())


def trial_of(seen: Seen, point: str) -> dict[str, Any]:
    """The first trial of a point, with its columns by their names."""
    trial = next(t for t in seen.data["trials"] if t["point"] == point)
    return {**trial, **dict(zip(seen.data["columns"], trial["columns"], strict=True))}


def hostile_run(folder: RunFolder) -> None:
    """Names and errors that try to become code."""
    run = folder.run()
    lab = {**run.lab, "title": HOSTILE, "question": HOSTILE}
    write_json(folder.path / "run.json", run.model_copy(update={"model": HOSTILE, "lab": lab}))
    points = run.points()
    write_json(
        folder.trial_folder(points[0], 1) / "trial.json",
        TrialResult(point=points[0].key, repeat=1, failed=HOSTILE),
    )
    broken = [make_record([(11.0, 1), (12.0, 3)]), make_record([], error=HOSTILE, index=1)]
    records.write(folder.trial_folder(points[1], 1) / "requests.jsonl.gz", broken)


def test_a_page_says_what_the_report_says(folder: RunFolder) -> None:
    seen, summary = written(folder), folder.summary()
    for table in (
        tables.claims(folder.run().rebuilt_lab(), summary),
        tables.compared(folder.run().rebuilt_lab(), summary),
        tables.points(folder.run().points(), folder.run().rebuilt_lab(), summary),
    ):
        for cell in (c for row in (table.header, *table.rows) for c in row):
            assert plain_text(cell) in seen.read
    assert [c["title"] for c in seen.data["claims"]] == [j.title for j in summary.judgements]
    ids = seen.attributes("id")
    assert ids.index("the-answer") < ids.index("distributions") < ids.index("every-point")
    assert len(ids) == len(set(ids))
    targets = [h[1:] for h in seen.attributes("href") if h.startswith("#")]
    assert set(targets) <= set(ids)


def test_all_but_the_answer_validity_and_the_claims_is_folded(folder: RunFolder) -> None:
    document = report.document(report.Facts.of(folder), ())
    shown = [s.id for s in html.sections(document, html.embedded(folder.path)) if not s.folded]
    assert shown == ["the-answer", "validity", "claim-by-claim"]


def test_nothing_is_loaded_from_anywhere(folder: RunFolder) -> None:
    seen = written(folder)
    places = [*seen.attributes("src"), *seen.attributes("href"), *seen.attributes("srcset")]
    assert all(p.startswith(("#", "data:")) for p in places)
    own = [c for c in seen.code if c != IN_ITS_PLACE]
    assert len(own) == len(seen.code) - 1
    assert not any("http" in c or "url(" in c or "@import" in c for c in own)
    (policy,) = (a["content"] for _, a in seen.tags if a.get("http-equiv"))
    assert policy.startswith("default-src 'none';")
    assert "http" not in policy


def test_only_the_scripts_the_page_was_written_with_may_run(folder: RunFolder) -> None:
    hostile_run(folder)
    seen = written(folder)
    (policy,) = (a["content"] for _, a in seen.tags if a.get("http-equiv"))
    kinds = [a for tag, a in seen.tags if tag == "script"]
    assert [a.get("type") for a in kinds] == ["application/json", None, None]
    scripts = [LIBRARY if c == IN_ITS_PLACE else c for c in seen.code]
    for script in [c for c in scripts if c.lstrip().startswith(("/", '"use'))][-2:]:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
    assert "'unsafe-inline'" not in policy.split("script-src")[1].split(";")[0]


def test_what_tries_to_be_code_is_read_as_text(folder: RunFolder) -> None:
    hostile_run(folder)
    seen = written(folder)
    assert seen.read.count("<script>hacked()</script>") > 3  # as a reader sees it
    assert not seen.attributes("onerror")
    assert all(s.startswith("data:image/svg+xml") for t, a in seen.tags if t == "img"
               for s in [a["src"]])  # fmt: skip
    assert not [h for h in seen.attributes("href") if "script" in h]
    assert HOSTILE in seen.data["trials"][0]["failed"]
    entry = site.Entry(folder, folder.run(), folder.summary(), "a/b/c.html")
    out = Seen(site.Course([entry]).pages()["machines.html"])
    assert "<script>hacked()</script>" in out.read
    assert not out.attributes("onerror")


def test_a_missing_figure_is_a_dash_and_null_never_zero(folder: RunFolder) -> None:
    for repeat in (1, 2):
        path = folder.path / f"trials/on/short/concurrent-2/{repeat}/trial.json"
        failed = TrialResult(point="on/short/concurrent-2", repeat=repeat, failed="engine died")
        write_json(path, failed)
    seen = written(folder)
    (gone,) = (p for p in seen.data["points"] if p["key"] == "on/short/concurrent-2")
    assert gone["figures"] == {}
    (claim,) = (c for c in seen.data["claims"] if c["point"] == "on/short/concurrent-2")
    assert (claim["value"], claim["low"], claim["high"]) == (None, None, None)
    assert {t["failed"] for t in seen.data["trials"] if t["point"] == gone["key"]} == {
        "engine died"
    }
    assert all(gone["key"] not in of["points"] for of in seen.data["samples"].values())


def test_requests_in_columns_of_tenths_of_milliseconds(folder: RunFolder) -> None:
    point = folder.run().points()[0]
    found = [
        make_record([(10.2, 1), (10.25, 1), (10.75, 1)], sent_s=10.0, index=3),
        make_record([], sent_s=9.0, index=4, end_s=9.5),
    ]
    records.write(folder.trial_folder(point, 1) / "requests.jsonl.gz", found)
    seen = written(folder)
    trial = trial_of(seen, point.key)
    assert trial["index"] == [4, 3]  # by when they were sent
    assert trial["start_dms"] == [90_000, 100_000]
    assert trial["first_dms"] == [None, 2_000]
    assert trial["last_dms"] == [5_000, 7_500]
    assert trial["gap_dms"] == [None, 5_000]
    assert trial["tpot_dms"] == [None, 2_750]
    assert trial["errors"] == {"0": 0}
    assert seen.data["errors"] == ["ConnectionError: refused"]
    assert trial["counted"] == [0, 1]


def test_what_a_limit_refused_has_not_failed_and_its_message_is_short() -> None:
    refused = 'HTTP 503: {"error": "busy"}'
    assert chart_data._went_wrong(refused, turned_away=True) == "turned away: HTTP 503"
    assert chart_data._went_wrong(refused, turned_away=False) == refused


def test_of_too_many_requests_the_longest_stay_and_the_page_says_so(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    point = folder.run().points()[0]
    found = [make_record([(11.0, 1), (11.0 + i, 1)], index=i) for i in range(1, 6)]
    found.append(make_record([], index=9))
    records.write(folder.trial_folder(point, 1) / "requests.jsonl.gz", found)
    monkeypatch.setattr(chart_data, "_shared_out", lambda sent, most: {})
    trial = trial_of(written(folder), point.key)
    assert (trial["sent"], trial["shown"], sorted(trial["index"])) == (6, 3, [4, 5, 9])


def test_first_repeats_are_shown_whole_before_any_other() -> None:
    sent = {("a", 1): 20, ("b", 1): 30, ("a", 2): 20, ("b", 2): 80}
    assert chart_data._shared_out(sent, 1000) == sent
    assert chart_data._shared_out(sent, 60) == {**sent, ("a", 2): 3, ("b", 2): 8}
    assert chart_data._shared_out(sent, 25) == {
        ("a", 1): 10, ("b", 1): 15, ("a", 2): 3, ("b", 2): 3
    }  # fmt: skip


def test_a_column_is_written_as_short_as_it_can_be_read() -> None:
    assert chart_data._packed("index", [4, 5, 6]) == 4
    assert chart_data._packed("index", [4, 4]) == [4, 4]
    assert chart_data._packed("prompt", [128, 128]) == 128
    assert chart_data._packed("gap_dms", [None, None]) is None
    assert chart_data._packed("gap_dms", [None, 3]) == [None, 3]
    assert chart_data._packed("index", []) == []


def test_samples_are_quantiles_of_all_repeats(folder: RunFolder) -> None:
    point = folder.run().points()[0]
    for repeat in (1, 2):
        found = [make_record([(10 + (i + repeat) / 100, 1)], index=i) for i in range(300)]
        home = folder.trial_folder(point, repeat)
        records.write(home / "requests.jsonl.gz", found)
        write_json(home / "trial.json", TrialResult(
            point=point.key, repeat=repeat, summary=make_summary(sent=300)))  # fmt: skip
    ttft = written(folder).data["samples"]["ttft_s"]["points"][point.key]
    assert ttft["n"] == 600
    assert len(ttft["ms"]) == chart_data.MOST_QUANTILES
    assert (ttft["ms"][0], ttft["ms"][-1]) == (10, 3010)


@pytest.mark.parametrize("name", ["../other.svg", "http://there/a.svg", "gone.svg", "run.json"])
def test_a_picture_is_of_this_run_or_it_is_not_shown(folder: RunFolder, name: str) -> None:
    (folder.path.parent / "other.svg").write_text("<svg/>")
    seen = Seen(str(html.fragment([Figure(name, "A plot")], html.embedded(folder.path))))
    assert "img" not in [tag for tag, _ in seen.tags]
    assert seen.read.strip() == f"(A plot: {name} is missing)"


def test_a_page_shows_the_runs_pictures_and_reads_no_markdown(folder: RunFolder) -> None:
    before = written(folder)
    assert [a["alt"] for tag, a in before.tags if tag == "img"] == [
        "Each claim's measured ratio with its interval, and its prediction."
    ]
    (folder.path / "report.md").unlink()
    assert Seen(pages.write(folder).read_text()).tags == before.tags
    (folder.path / "effects.svg").unlink()
    assert "effects.svg is missing" in Seen(pages.write(folder).read_text()).read


def test_a_site_has_every_run_that_can_be_read_and_links_that_lead_there(
    folder: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        site, "LABS", dict([*LABS.items()][:1])
    )  # committed/test_site.py writes all lessons
    written(folder)
    run = folder.run()
    quick = RunFolder(folder.path.with_name("20260202T000000Z-quick"))
    damaged = RunFolder(folder.path.with_name("20260303T000000Z-damaged"))
    for other in (quick, damaged):
        other.path.mkdir()
        for name in ("run.json", "summary.json", "predictions.json", "report.md"):
            (other.path / name).write_bytes((folder.path / name).read_bytes())
    marked = {"quick": True, "reproduces": folder.path.name}
    write_json(quick.path / "run.json", run.model_copy(update=marked))
    (damaged.path / "summary.json").write_text("{")

    gone = tmp_path / "out" / run.machine.slug / "tiny" / "20250101T000000Z-01234567.html"
    notes = gone.with_name("notes.html")
    gone.parent.mkdir(parents=True)
    for page in (gone, notes):
        page.touch()
    index, left_out = site.write_site(tmp_path / "out")
    assert (gone.exists(), notes.exists()) == (False, True)
    assert list(left_out) == [f"{run.machine.slug}/tiny/{damaged.path.name}"]
    seen = Seen((index.parent / "machines.html").read_text())
    links = [h for h in seen.attributes("href") if h.startswith(run.machine.slug)]
    assert len(set(links)) == 2
    for link in links:
        text = (index.parent / link).read_text()
        assert 'src="../../plotly.min.js"' in text
        assert LIBRARY not in text
    assert (index.parent / "plotly.min.js").read_text() == LIBRARY
    assert "quick, repetition, not complete" in seen.read
