"""The course: a lesson follows from the lab's own file, an answer from the run that gave it."""

from __future__ import annotations

import json
import os
import re
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from labs import LABS
from labs.harness.derived.lab_modules import kept, parts_of
from labs.harness.reports import chart_data, dials, replay, residuals
from labs.harness.reports.computed import computed
from labs.harness.reports.document import Figure, parse, plain_text
from labs.harness.reports.pages import PLOTLY, STYLE, page
from labs.harness.site.site import LIVE_PAGE, Course, Entry, Lesson, shared_files, write_site
from labs.harness.spec.page import lesson
from labs.harness.spec.questions import QUESTIONS, TOPICS
from labs.harness.storage import engine_series, results
from labs.harness.storage.results import RunFolder
from labs.harness.storage.writing import write_gzip
from serving import metrics
from tests.committed import in_git
from tests.unit.builders import write_run
from tests.unit.test_html import Seen

ROOM_FOR, MOST_OF_A_RUN = 30, 500_000  # runs, and bytes of the longest page of one


def entry_of(folder: RunFolder) -> Entry:
    machine, lab, name = folder.path.parts[-3:]
    return Entry(folder, folder.run(), folder.summary(), f"{machine}/{lab}/{name}.html")


@pytest.fixture(scope="module")
def entries(committed: Path) -> list[Entry]:
    """The published runs, oldest first."""
    return [entry_of(RunFolder(committed / "results" / name)) for name in in_git.runs()]


@pytest.fixture(scope="module")
def course(entries: list[Entry], committed: Path) -> Course:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results, "RESULTS", committed / "results")
        return Course(entries)


@pytest.fixture(scope="module")
def texts(course: Course) -> dict[str, str]:
    """Every page of the course but those of runs, by its address."""
    return course.pages() | {item.href: course.lesson_page(item) for item in course.lessons}


def test_every_published_summary_keeps_the_facts_of_its_lab_as_it_is_today(
    entries: list[Entry],
) -> None:
    """Else plots and answers are left out of a page, though the run is well formed."""
    own = [entry for entry in entries if parts_of(entry.lab).facts]
    assert own
    assert [e.href for e in own if kept(e.lab, e.summary.facts) is None] == []


def test_every_lab_has_a_lesson_in_the_order_of_the_course_without_any_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    index, _ = write_site(tmp_path / "site")
    links = [h for h in Seen(index.read_text()).attributes("href") if h.startswith("lessons/")]
    assert list(dict.fromkeys(links)) == [f"lessons/{name}.html" for name in LABS]
    for name, lab in LABS.items():
        seen = Seen((index.parent / "lessons" / f"{name}.html").read_text())
        read = re.sub(r"\s+", " ", seen.read)
        assert lab.title in read
        assert re.sub("[*`]", "", lesson(name)[0])[:60] in read
        assert f"make lab-{name}" in read


def test_a_question_is_answered_by_the_run_that_answers_it(
    course: Course, texts: dict[str, str]
) -> None:
    asked = [asked for _, found in course.topics() for asked in found]
    assert [of.id for of in asked] == list(QUESTIONS)
    told = {of.id: of.answers for of in asked}
    given = {
        (id, e.href) for e in course.newest for id in e.told.answers if id in LABS[e.lab].answers
    }
    assert {(id, a.entry.href) for id, found in told.items() for a in found} == given
    seen = Seen(texts["questions.html"])
    assert set(QUESTIONS) <= set(seen.attributes("id"))
    for of in asked:
        assert of.id.partition("-")[0] in TOPICS
        assert of.kind.startswith(("measured", "arithmetic on measured")) == bool(of.answers)
        for lab in of.by_lab:  # nothing of an answer in brief is lost or told twice
            for answered, row in lab.rows:
                together = " ".join(part for part in (lab.mechanism, row) if part)
                assert together == answered.answer.brief
                assert row
        if answer := computed(of.id):
            assert plain_text(answer.answer.brief) in seen.read


def test_a_quick_or_changed_run_displaces_no_full_one(
    entries: list[Entry], committed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "RESULTS", committed / "results")
    entry = next(e for e in reversed(entries) if residuals.is_full(e.folder))
    assert Course([entry]).newest == [entry]
    for update in ({"quick": True}, {"changes": {"repeats": 1}}):
        other = replace(entry, run=entry.run.model_copy(update=update))
        monkeypatch.setattr(RunFolder, "run", lambda _, run=other.run: run)
        assert Course([other]).newest == []
        monkeypatch.undo()
        monkeypatch.setattr(results, "RESULTS", committed / "results")


@pytest.fixture(scope="module")
def page_of(committed: Path) -> Callable[[str], str]:
    """The page of a published run by its name, in a site of many; rendered once.

    A plot is drawn again for its caption alone: that is done for the newest run of each lab, and
    the others show theirs as they are on file.
    """
    most_requests = chart_data.REQUESTS_OF_A_SITE // ROOM_FOR
    newest = {name.split("/")[1]: name for name in in_git.runs()}

    @cache
    def rendered(name: str) -> str:
        folder = RunFolder(committed / "results" / name)
        on_file = [Figure(file.name, file.stem) for file in sorted(folder.path.glob("*.svg"))]
        figures = None if name in newest.values() else on_file
        return page(folder, "../../", most_requests, figures)

    return rendered


@pytest.mark.parametrize("name", in_git.runs())
def test_pages_of_the_published_runs_are_whole_and_small(
    name: str, committed: Path, page_of: Callable[[str], str]
) -> None:
    run, text = RunFolder(committed / "results" / name), page_of(name)
    assert len(text.encode()) < MOST_OF_A_RUN
    seen = Seen(text)
    assert all(plain_text(parse(j.title)) in seen.read for j in run.summary().judgements)
    ids = seen.attributes("id")
    assert len(ids) == len(set(ids))
    for trial in seen.data["trials"]:
        if "failed" not in trial:
            least = min(trial["sent"], chart_data.LEAST_REQUESTS)
            assert least <= trial["shown"] <= trial["sent"]
            lists = [column for column in trial["columns"] if isinstance(column, list)]
            assert len(trial["columns"]) == len(seen.data["columns"])
            assert all(len(column) == trial["shown"] for column in lists)


def test_the_whole_stays_small_with_many_runs(
    course: Course, texts: dict[str, str], page_of: Callable[[str], str]
) -> None:
    """Beside the plotting library, with pages as long as those of the published runs on average.

    How long each may be is tested with each published one. The page of forecasts lists the misses
    of all runs, so that each run has a share in it as well.
    """
    files = {name: text for name, text in shared_files().items() if name != PLOTLY}
    others = [text for name, text in texts.items() if name != "forecasts.html"]
    beside = sum(len(text.encode()) for text in (*others, *files.values()))
    names = in_git.runs()
    of_forecasts = len(texts["forecasts.html"].encode()) / len(names)
    each = statistics.mean(len(page_of(name).encode()) for name in names) + of_forecasts
    assert beside + ROOM_FOR * each < 14_000_000


def test_links_within_the_course_lead_somewhere(course: Course, texts: dict[str, str]) -> None:
    pages = {name: Seen(text) for name, text in texts.items()}
    runs, files = {e.href for e in course.entries}, {STYLE}
    for name, seen in pages.items():
        ids = seen.attributes("id")
        assert len(ids) == len(set(ids)), name
        for link in dict.fromkeys(seen.attributes("href")):
            path, _, place = link.partition("#")
            if link.startswith("data:") or link == LIVE_PAGE:
                continue
            found = (
                os.path.normpath(f"{os.path.dirname(name)}/{path}".lstrip("/")) if path else name
            )
            assert found in {*pages, *runs, *files}, (name, link)
            if place and found in pages:
                assert place in pages[found].attributes("id"), (name, link)


def test_the_page_of_forecasts_counts_every_miss(course: Course, texts: dict[str, str]) -> None:
    full = [e for e in course.entries if residuals.is_full(e.folder)]
    found = residuals.of_runs(e.folder for e in full)
    seen = Seen(texts["forecasts.html"])
    misses = sum(not r.near for r in found)
    assert f"Misses: {misses:,} of {len(found):,} lie further off than 25%" in seen.read


def test_a_guess_is_asked_for_in_words_that_do_not_give_the_answer_away(course: Course) -> None:
    for item in course.lessons:
        assert item.claim.title not in item.asked
        assert re.search(r": how does that change the [^?]+\?$", item.asked), item.asked
        assert parts_of(item.lab.name).headline, "a reader should not meet a variant's name first"


def test_without_a_run_a_guess_is_held_against_the_prediction_and_says_so(course: Course) -> None:
    item = next(i for i in course.lessons if i.lab.name == "paged-kv")
    unmeasured = replace(item, entries=())
    assert dict(unmeasured.predicted).keys() == {card.name for card in dials.cards()}
    seen = Seen(course.lesson_page(unmeasured))
    assert len(seen.data["foretold"]) == len(dials.cards())
    assert "No published run has measured it yet" in seen.read
    assert all(not i.predicted for i in course.lessons if i.guessed)


def test_a_measurement_that_is_not_valid_gives_way_to_one_that_is(course: Course) -> None:
    item = next(i for i in course.lessons if len(i.guessed) > 1)
    (first, judged), *rest = item.guessed
    spoilt = judged.model_copy(update={"outcome": "not valid"})
    other = replace(first, summary=first.summary.model_copy(update={"judgements": [spoilt]}))
    mixed = replace(item, entries=(other, *(e for e, _ in rest)))
    assert [e for e, _ in mixed.guessed] == [e for e, _ in rest]
    assert [j.outcome for _, j in replace(item, entries=(other,)).guessed] == ["not valid"]


def test_a_row_of_claims_is_told_once_and_a_machines_older_settings_are_named(
    course: Course, texts: dict[str, str]
) -> None:
    for item in course.lessons:
        told = [(str(row.title), row.where) for row in item.rows()]
        assert len(told) == len(set(told)), item.lab.name
        if item.entries:
            seen = Seen(texts[item.href])
            marked = "settings have changed since" in seen.read
            assert marked == any(e.stale for e in item.entries), item.lab.name


def test_a_replay_shows_every_token_of_its_seconds_once(course: Course) -> None:
    for item in course.lessons:
        if not item.replayed:
            continue
        _, panels = item.replayed
        for panel in panels:
            times = panel.times
            assert len(times["chunks"]) <= replay.MOST_CHUNKS * 4
            assert all(0 <= t <= times["span"] for t, _ in times["chunks"])
            assert str(panel.picture).count('<path class="token') == len(times["bars"])
        spans = {panel.times["span"] for panel in panels}
        assert len(spans) == 1  # side by side over the same seconds


def test_the_first_picture_of_the_course_is_a_replay_of_several_requests(
    texts: dict[str, str],
) -> None:
    index = texts["index.html"]
    pictures = re.findall(r'<(?:img|svg|div class="plot")[^>]*', index)
    assert [picture.partition(" viewBox")[0] for picture in pictures] == ['<svg class="replay"'] * 2
    assert all(
        int(places) > 1 for places in re.findall(r"at most (\d+) at once", "".join(pictures))
    )
    data = json.loads(index.partition('id="data">')[2].partition("</script>")[0])
    assert len(data["replay"]) == 2


def usage(engine: str, *readings: tuple[float, float]) -> dict[str, Any]:
    """A trial's series of how full an engine's KV cache was: (seconds from its start, share)."""
    return {
        "name": metrics.KV_USAGE, "labels": {"engine": engine},
        "times_s": [at for at, _ in readings], "values": [share for _, share in readings],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("kept", "stands"),
    [
        ([usage("0", (5.0, 0.9), (10.5, 0.25), (11.5, 0.5))], "shown"),
        ([usage("0", (5.0, 0.9))], "missed"),
        ([usage("0", (10.5, 0.9)), usage("1", (10.5, 0.1))], "older"),  # two caches, and not one
        (None, "older"),
    ],
)
def test_a_replay_shows_how_full_the_cache_was_where_the_trial_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: list[Any] | None, stands: str
) -> None:
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    folder = write_run(tmp_path)
    points = folder.run().points()
    for point in points:
        if kept:
            write_gzip(folder.trial_folder(point, 1) / engine_series.FILE, kept)
    lab = LABS["paged-kv"]
    claim = folder.run().rebuilt_lab().claims[0]
    entry = entry_of(folder)
    item = Lesson(lab.model_copy(update={"claims": (claim,)}), 5, (entry,))
    monkeypatch.setattr(Lesson, "claim", claim)
    assert item.replayed
    _, (panel, _) = item.replayed
    assert item.cache == stands
    assert ("KV cache in use" in str(panel.picture)) == (stands == "shown")
    assert ("of the KV cache was in use" in panel.description) == (stands == "shown")
    if stands == "shown":
        assert panel.cache == replay.Cache((0.5, 1.5), (0.25, 0.5), 999)
        assert "At most 50% (500 of 999 blocks) of the KV cache was in use." in panel.description
        assert panel.times["cache"] == [
            [500, "25% (250 of 999 blocks)"],
            [1500, "50% (500 of 999 blocks)"],
        ]
        tops = [float(y) for y in re.findall(r'<circle cx="[\d.]+" cy="([\d.]+)"', panel.picture)]
        assert tops[0] - tops[1] == pytest.approx(0.25 * replay.CACHE_HEIGHT, abs=0.11)


def test_accepted_drafts_are_told_where_the_engine_guesses(course: Course) -> None:
    """A chunk of k tokens is the target's own and k - 1 drafts; so high is its line."""
    bars = [replay._Bar(0, 0.0, 0.5, 2.0, (0.5, 1.0, 1.5), (1, 6, 3), 8)]
    plain, guessed = (
        replay._replayed("a", bars, 2.0, "clip", guesses=guesses) for guesses in (False, True)
    )
    assert "7 were drafts that the target accepted" in guessed.description
    assert "drafts" not in plain.description
    heights = [float(h) for h in re.findall(r"v-([\d.]+)", str(guessed.picture))]
    assert heights == pytest.approx([heights[1] / 6, heights[1], heights[1] / 2], abs=0.1)
    assert len(set(re.findall(r"v-([\d.]+)", str(plain.picture)))) == 1
    guessing = [
        panel.times["guesses"] for i in course.lessons if i.replayed for panel in i.replayed[1]
    ]
    assert True in guessing
    assert False in guessing


def test_what_to_turn_is_a_command_with_its_setting_whole(course: Course) -> None:
    for item in course.lessons:
        for command, told in item.turns:
            assert command.count('"') % 2 == 0
            assert re.fullmatch(r"make lab-[a-z0-9-]+( SET=(\"[^\"]+\"|'[^']+'))?", command), (
                command
            )
            assert told


def test_prefill_and_decode_apart_has_a_page_that_lessons_lead_to(
    course: Course, texts: dict[str, str]
) -> None:
    leading = [
        i for i in course.lessons if "../apart.html" in Seen(texts[i.href]).attributes("href")
    ]
    assert {"chunked-prefill", "serving-engines"} <= {i.lab.name for i in leading}
    back = Seen(texts["apart.html"]).attributes("href")
    assert {i.href for i in leading} <= set(back)
    assert "apart.html" in Seen(texts["index.html"]).attributes("href")


def test_a_runs_page_leads_to_its_lesson_and_to_the_glossary(
    course: Course, texts: dict[str, str]
) -> None:
    entry = course.newest[0]
    links = Seen(page(entry.folder, "../../", 9)).attributes("href")
    assert {f"../../lessons/{entry.lab}.html", "../../glossary.html"} <= set(links)
    there = {*texts, STYLE}
    for link in links:
        if link.startswith("../../"):
            assert link.removeprefix("../../").partition("#")[0] in there, link
