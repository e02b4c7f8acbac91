"""The course: a lesson follows from the lab's own file, an answer from the run that gave it."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

from labs import LABS
from labs.filing import results
from labs.filing.results import RunFolder
from labs.lab import parse_changes
from labs.questions import QUESTIONS, TOPICS
from labs.telling import dials, replay
from labs.telling.lesson import lesson
from labs.telling.site import Course, Entry, write_site
from serving import gpus
from tests.unit import in_git
from tests.unit.test_html import Seen


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


def test_a_question_is_answered_by_the_run_that_answers_it(course: Course) -> None:
    told = {id: answers for _, found in course.topics() for id, _, answers, _ in found}
    assert list(told) == list(QUESTIONS)
    given = {
        (id, e.href) for e in course.newest for id in e.summary.answers if id in LABS[e.lab].answers
    }
    assert {(id, a.entry.href) for id, found in told.items() for a in found} == given
    seen = Seen(course.pages()["questions.html"])
    assert set(QUESTIONS) <= set(seen.attributes("id"))
    for id in QUESTIONS:
        assert id.partition("-")[0] in TOPICS


def test_a_quick_or_changed_run_displaces_no_full_one(
    entries: list[Entry], committed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "RESULTS", committed / "results")
    entry = entries[-1]
    quick = replace(entry, run=entry.run.model_copy(update={"quick": True}))
    monkeypatch.setattr(RunFolder, "run", lambda f: quick.run if f is quick.folder else entry.run)
    assert Course([quick]).newest == []


def test_links_within_the_course_lead_somewhere(course: Course) -> None:
    texts = course.pages()
    texts |= {item.href: course.lesson_page(item) for item in course.lessons}
    pages = {name: Seen(text) for name, text in texts.items()}
    runs, files = {e.href for e in course.entries}, {"page.css"}
    for name, seen in pages.items():
        ids = seen.attributes("id")
        assert len(ids) == len(set(ids)), name
        for link in dict.fromkeys(seen.attributes("href")):
            path, _, place = link.partition("#")
            if link.startswith("data:"):
                continue
            found = (
                os.path.normpath(f"{os.path.dirname(name)}/{path}".lstrip("/")) if path else name
            )
            assert found in {*pages, *runs, *files}, (name, link)
            if place and found in pages:
                assert place in pages[found].attributes("id"), (name, link)


def test_a_replay_shows_every_token_of_its_seconds_once(course: Course) -> None:
    for item in course.lessons:
        if not item.replayed:
            continue
        _, panels = item.replayed
        for panel in panels:
            times = panel.times
            assert len(times["chunks"]) <= replay.MOST_CHUNKS * 4
            assert all(0 <= t <= times["span"] for t, _ in times["chunks"])
            assert str(panel.picture).count('class="token"') == len(times["bars"])
        spans = {panel.times["span"] for panel in panels}
        assert len(spans) == 1  # side by side over the same seconds


def test_what_to_turn_is_a_command_with_its_setting_whole(course: Course) -> None:
    for item in course.lessons:
        for command, told in item.turns:
            assert command.count('"') % 2 == 0
            assert re.fullmatch(r"make lab-[a-z0-9-]+( SET=(\"[^\"]+\"|'[^']+'))?", command), (
                command
            )
            assert told


def test_a_dial_says_what_the_lab_itself_predicts_there(course: Course) -> None:
    """At the lab's own setting a curve has the value of the claim's own function."""
    turned = 0
    for item in course.lessons:
        found = item.dials
        for curve in found.get("curves", ()):
            machine = found["machines"][curve["machine"]]
            claim = found["claims"][curve["claim"]]
            if machine["card"] or not claim["name"]:
                continue
            (entry,) = [e for e in item.entries if e.machine == machine["name"]]
            lab = item.lab.at(entry.run.scale, quick=False)
            of = dials.Hardware.of(entry.run)
            points = lab.points(of.shape, of.ceilings, of.weights, of.about)
            asked = next(c for c in lab.claims if c.name == claim["name"])
            pair = lab.pairs(asked, points)[0]
            at_base = curve["y"][curve["x"].index(curve["base"])]
            predicted = asked.predict(*pair).value
            assert at_base == pytest.approx(predicted, rel=1e-3), (item.lab.name, curve["set"])
            turned += 1
        assert len(json.dumps(found)) < 60_000
    assert turned > 20


def test_every_card_has_a_curve_and_every_setting_is_one_that_set_takes(course: Course) -> None:
    item = next(i for i in course.lessons if i.lab.name == "chunked-prefill")
    assert {m["card"] for m in item.dials["machines"]} >= set(gpus.short_names())
    for curve in item.dials["curves"]:
        assert curve["set"]
        changes = parse_changes(curve["set"].replace("{}", str(curve["x"][0])))
        item.lab.at("cpu", quick=False, changes=changes)  # raises LabError if it is no setting
