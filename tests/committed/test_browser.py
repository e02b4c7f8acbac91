"""The pages in a real browser: opened, used, and no script error. Needs Debian's `chromium`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from labs.harness.reports import pages, report
from labs.harness.site.site import write_lesson, write_site
from labs.harness.storage import results
from labs.harness.storage.results import RunFolder
from tests.browser import Browser, Page, browser, find
from tests.committed import in_git
from tests.unit.builders import write_run
from tests.unit.test_html import hostile_run

pytestmark = pytest.mark.skipif(
    find() is None, reason="no chromium: `apt-get install chromium` brings it"
)
RUNS = ("continuous-batching", "chunked-prefill")  # one with a sweep, one with long prompts
PLOTS = ("claims", "samples", "left", "right", "timeline", "forecasts")


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as chromium:
        yield chromium


@pytest.fixture
def chromium(started: Browser) -> Iterator[Browser]:
    """The browser, whose tabs end with the test that opened them."""
    yield started
    started.close_tabs()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, committed: Path) -> Path:
    """The site of two published runs, copied; their folders lie beside it."""
    home = tmp_path_factory.mktemp("site")
    for name in map(in_git.newest, RUNS):
        shutil.copytree(committed / "results" / name, home / "results" / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results, "RESULTS", home / "results")
        write_site(home / "site")
    return home


def folder_of(site: Path, lab: str) -> RunFolder:
    (run,) = (site / "results").glob(f"*/{lab}/*/run.json")
    return RunFolder(run.parent)


def opened(chromium: Browser, path: Path, width: int = 1280, scheme: str = "light") -> Page:
    page = Page(chromium, width, 900)
    page.prefer(scheme)
    page.open(path)
    return page


def of(site: Path, lab: str) -> Path:
    (path,) = (site / "site").glob(f"*/{lab}/*.html")
    return path


@pytest.mark.parametrize("lab", RUNS)
@pytest.mark.parametrize("width", [1280, 390])
def test_every_plot_is_drawn_and_nothing_else_is_asked_for(
    chromium: Browser, site: Path, lab: str, width: int
) -> None:
    page = opened(chromium, of(site, lab), width)
    for plot in PLOTS:
        assert page.js(f"document.querySelectorAll('#{plot} .main-svg').length > 0"), plot
    assert page.errors == []
    assert {url.split(":")[0] for url in page.requested} == {"file", "data"}
    assert page.js("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.parametrize("lab", RUNS)
def test_no_table_is_cut_off_on_a_desktop(chromium: Browser, site: Path, lab: str) -> None:
    page = opened(chromium, of(site, lab))
    page.js("document.querySelectorAll('details').forEach(fold => fold.open = true)")
    cut = "[...document.querySelectorAll('.table')].filter(e => e.scrollWidth > e.clientWidth)"
    page.wait(f"{cut}.length === 0")


def test_a_link_to_a_folded_section_opens_it(chromium: Browser, site: Path) -> None:
    page = opened(chromium, of(site, RUNS[0]))
    fold = "document.querySelector('#how-it-was-measured > details').open"
    assert not page.js(fold)
    page.js("document.querySelector('nav a[href=\"#how-it-was-measured\"]').click()")
    page.wait(fold)
    assert page.errors == []


def test_the_one_file_of_a_run_needs_no_other(chromium: Browser, site: Path) -> None:
    path = pages.write(folder_of(site, RUNS[0]))
    page = opened(chromium, path)
    assert page.js("document.querySelectorAll('#timeline .main-svg').length > 0")
    assert page.errors == []
    files = [url for url in page.requested if url.startswith("file:")]
    assert files == [path.as_uri()]


def test_a_table_sorts_from_the_keyboard_by_number_with_dashes_last(
    chromium: Browser, site: Path
) -> None:
    page = opened(chromium, of(site, RUNS[0]))
    page.js("document.querySelectorAll('details').forEach(fold => fold.open = true)")
    table = "document.querySelector('#every-point table')"
    page.js(f"{table}.rows[1].cells[2].textContent = '–'")
    cells = f"[...{table}.tBodies[0].rows].map(r => r.cells[2].textContent)"
    page.js(f"{table}.rows[0].cells[2].querySelector('button').focus()")
    told = f"{table}.rows[0].cells[2].getAttribute('aria-sort')"

    def in_ms(text: str) -> float:
        value, unit = text.split()
        return float(value.replace(",", "")) * {"ms": 1, "s": 1000}[unit]

    for way, reverse in (("ascending", False), ("descending", True)):
        page.press("Enter")
        *found, last = page.js(cells)
        assert page.js(told) == way
        assert last == "–"
        assert found == sorted(found, key=in_ms, reverse=reverse)
    assert page.js("document.activeElement.matches(':focus-visible')")
    assert page.errors == []


def test_the_metric_and_how_it_is_drawn_are_chosen(chromium: Browser, site: Path) -> None:
    page = opened(chromium, of(site, RUNS[0]))
    title = "document.getElementById('samples').layout.xaxis.title.text"
    for metric, name in (("itl_s", "ITL (ms)"), ("e2e_s", "E2E (ms)")):
        page.choose("samples-metric", metric)
        assert page.js(title) == name
    page.choose("samples-scale", "log")
    assert page.js("document.getElementById('samples').layout.xaxis.type") == "log"
    page.choose("samples-shape", "violin")
    assert page.js("document.getElementById('samples').data.every(t => t.type === 'violin')")
    page.choose("samples-workload", "fixed")
    assert page.js("document.getElementById('samples').data.length") == 2
    page.choose("left-metric", "mbu")
    assert page.js("document.getElementById('left').layout.yaxis.title.text") == "MBU (%)"
    assert page.errors == []


def test_a_trial_is_chosen_and_its_longest_request_found(chromium: Browser, site: Path) -> None:
    page = opened(chromium, of(site, RUNS[0]))
    folder = folder_of(site, RUNS[0])
    point = folder.run().points()[4]
    found = folder.records(point.key, 2)
    page.choose("trial-point", point.key)
    page.choose("trial-repeat", "2")
    table = "document.getElementById('trial-table').textContent"
    assert "outside the window" not in page.js(table)
    page.choose("trial-order", "e2e")
    assert page.js("document.getElementById('timeline').data[0].y.length") == len(found)
    longest = max(found, key=lambda r: r.e2e_s or 0)
    first = "document.querySelector('#trial-table tbody').rows[0].cells[0].textContent"
    assert page.js(first) == str(longest.index)
    hover = page.js("document.getElementById('timeline').data[0].hovertext[0]")
    assert f"request {longest.index}<br>{longest.prompt_tokens} prompt" in hover
    assert f"{len(found)} requests" in page.js("document.getElementById('trial-said').textContent")
    assert page.errors == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_follow_the_system_until_the_reader_chooses(
    chromium: Browser, site: Path, scheme: str
) -> None:
    page = opened(chromium, of(site, RUNS[1]), scheme=scheme)
    page.js("localStorage.clear()")
    page.reload()
    page.wait("document.querySelector('#claims .main-svg')")
    paper = "getComputedStyle(document.body).backgroundColor"
    ink = "document.getElementById('claims').layout.font.color"
    light, dark = ("rgb(255, 255, 255)", "#1b1f24"), ("rgb(20, 23, 28)", "#e6e8eb")
    before, after = (light, dark) if scheme == "light" else (dark, light)
    assert (page.js(paper), page.js(ink)) == before
    page.js("document.getElementById('theme').focus()")
    page.press("Enter")
    assert (page.js(paper), page.js(ink)) == after
    page.reload()
    page.wait("document.querySelector('#claims .main-svg')")
    assert page.js(paper) == after[0]  # it is kept
    page.js("localStorage.clear()")
    assert page.errors == []


def test_the_index_filters_and_sorts(chromium: Browser, site: Path) -> None:
    page = opened(chromium, site / "site" / "machines.html", 390)
    shown = "[...document.querySelectorAll('#all-runs tbody tr')].filter(r => !r.hidden).length"
    said = "document.getElementById('shown').textContent"
    assert (page.js(shown), page.js(said)) == (2, "2 of 2 runs")
    page.js("document.querySelector('[name=words]').focus()")
    page.call("Input.insertText", text="SmolLM2 chunked")
    assert (page.js(shown), page.js(said)) == (1, "1 of 2 runs")
    labs = "[...document.querySelectorAll('#all-runs tbody tr')].map(r => r.dataset.lab)"
    page.js("document.querySelector('#all-runs th button').focus()")
    page.press("Enter")
    assert page.js(labs) == sorted(RUNS)
    page.press("Enter")
    assert page.js(labs) == sorted(RUNS, reverse=True)
    assert page.js("document.documentElement.scrollWidth <= innerWidth")
    assert page.errors == []


def test_a_name_that_is_code_does_not_run(
    chromium: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    folder = write_run(tmp_path)
    hostile_run(folder)
    report.write(folder)
    page = Page(chromium, 1280, 900)
    page.call("Page.addScriptToEvaluateOnNewDocument",
              source="window.ran = 0; window.hacked = () => { window.ran += 1; };")  # fmt: skip
    page.open(pages.write(folder))
    page.choose("trial-point", folder.run().points()[1].key)
    assert "hacked()" in page.js("document.getElementById('trial-table').textContent")
    assert page.js("window.ran") == 0
    assert page.errors == []


def test_without_scripts_every_table_and_picture_is_there(chromium: Browser, site: Path) -> None:
    shown = Page(chromium, 1280, 900)
    shown.call("Emulation.setScriptExecutionDisabled", value=True)
    shown.open(of(site, RUNS[0]))
    assert shown.js("getComputedStyle(document.getElementById('distributions')).display") == "none"
    assert shown.js("document.querySelectorAll('noscript img').length") == 2
    assert "Scripts are off" in shown.js("document.body.innerText")


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_a_lesson_takes_a_guess_before_it_shows_the_answer(
    chromium: Browser, site: Path, width: int, scheme: str
) -> None:
    shown = opened(chromium, site / "site" / "lessons" / f"{RUNS[0]}.html", width, scheme)
    answer = "document.getElementById('revealed').open"
    assert not shown.js(answer)
    shown.js("document.querySelector('.guesses button').focus()")
    shown.press("Enter")
    assert shown.js(answer)
    assert "You guessed less than half" in shown.js("document.getElementById('guessed').innerText")
    assert shown.js("document.documentElement.scrollWidth <= innerWidth")
    assert shown.errors == []


def test_a_worksheet_marks_an_answer_on_the_chosen_machine(chromium: Browser, site: Path) -> None:
    shown = opened(chromium, site / "site" / "lessons" / f"{RUNS[0]}.html", 390)
    shown.choose("worksheet-machine", "sheet-2")
    task = "document.querySelector('#sheet-2 .task')"
    shown.js(f"{task}.querySelector('input').value = JSON.parse({task}.dataset.marking).key")
    shown.js(f"{task}.querySelector('input').focus()")
    shown.press("Enter")
    assert shown.js(f"{task}.querySelector('.marked').matches('.right')")
    assert shown.js(f"{task}.querySelector('details').open")
    assert shown.js("document.querySelectorAll('.sheet:not([hidden])').length") == 1
    assert shown.js("document.documentElement.scrollWidth <= innerWidth")
    assert shown.errors == []


def test_questions_are_searched_by_all_words(chromium: Browser, site: Path) -> None:
    shown = opened(chromium, site / "site" / "questions.html", 390)
    count = "document.querySelectorAll('details.question:not([hidden])').length"
    every = shown.js(count)
    shown.js(
        "(e => { e.value = 'chunked prefill'; e.dispatchEvent(new Event('input')); })"
        "(document.getElementById('search'))"
    )
    assert 0 < shown.js(count) < every
    assert f"of {every} questions" in shown.js("document.getElementById('found').innerText")
    assert shown.errors == []


def test_a_cause_is_named_for_one_trial_after_another(
    chromium: Browser, committed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "RESULTS", committed / "results")
    run = RunFolder(committed / "results" / in_git.newest("diagnosis"))
    shown = opened(chromium, write_lesson(tmp_path, [run], "diagnosis"), 390)
    cause = "document.querySelector('.case:not([hidden])').dataset.cause"
    buttons = "[...document.querySelectorAll('button.cause')]"
    button = f"{buttons}.find(b => (b.textContent === {cause}) === %s)"
    said = "document.getElementById('blind-said')"
    shown.js(f"({button % 'false'}).click()")
    assert shown.js(f"{said}.matches('.wrong')")
    shown.js(f"({button % 'true'}).click()")
    assert shown.js(f"{said}.matches('.right')")
    assert shown.js("document.getElementById('blind-score').innerText").startswith("0 of 1")
    before = shown.js("[...document.querySelectorAll('.case')].findIndex(c => !c.hidden)")
    shown.js("document.getElementById('blind-next').click()")
    after = shown.js("[...document.querySelectorAll('.case')].findIndex(c => !c.hidden)")
    assert before != after
    assert shown.js("document.documentElement.scrollWidth <= innerWidth")
    assert shown.errors == []


def test_a_guess_where_nothing_was_measured_is_held_against_the_prediction(
    chromium: Browser, site: Path
) -> None:
    shown = opened(chromium, site / "site" / "lessons" / "paged-kv.html", 390)
    shown.js("document.querySelector('.guesses button').click()")
    assert "is predicted, and not measured yet" in shown.js(
        "document.getElementById('guessed').innerText"
    )
    assert shown.js("document.querySelectorAll('#revealed li').length") > 1
    assert shown.errors == []


@pytest.mark.parametrize("name", ["index.html", f"lessons/{RUNS[0]}.html"])
def test_a_replay_is_stepped_through_and_played_unless_motion_is_unwelcome(
    chromium: Browser, site: Path, name: str
) -> None:
    shown = opened(chromium, site / "site" / name)
    tokens = "document.querySelector('#replay .state').innerText.match(/(\\d+) tokens/)[1] * 1"
    whole = shown.js(tokens)
    shown.js("document.getElementById('step').click()")
    assert shown.js(tokens) < whole
    shown.js("document.getElementById('play').click()")
    shown.wait(f"{tokens} > 0")
    shown.call("Emulation.setEmulatedMedia",
               features=[{"name": "prefers-reduced-motion", "value": "reduce"}])  # fmt: skip
    shown.wait("document.getElementById('play').hidden")
    assert shown.errors == []


NAMELESS = """[...document.querySelectorAll('a, button, select, input, summary, svg[role=img]')]
  .filter(e => e.getClientRects().length && !(e.innerText || e.getAttribute('aria-label')
    || e.labels?.[0]?.innerText || '').trim()).map(e => e.outerHTML)"""
FAINT = """(() => {
  const parsed = (c) => c.match(/[\\d.]+/g).map(Number);
  const light = (c) => parsed(c).slice(0, 3).map(v => v / 255)
    .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (e) => { for (; e; e = e.parentElement) {
    const c = getComputedStyle(e).backgroundColor;
    if (parsed(c)[3] !== 0) return c; } return 'rgb(255, 255, 255)'; };
  return [...document.querySelectorAll('body *')].filter(e => e.getClientRects().length
      && [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())).filter(e => {
    const [a, b] = [light(getComputedStyle(e).color), light(behind(e))].sort((x, y) => y - x);
    return (a + 0.05) / (b + 0.05) < 4.5; }).map(e => e.outerHTML.slice(0, 200)); })()"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(
    "name",
    [
        "index.html",
        "questions.html",
        "machines.html",
        "planner.html",
        "apart.html",
        "forecasts.html",
        "glossary.html",
        f"lessons/{RUNS[1]}.html",
    ],
)
def test_everything_has_a_name_and_can_be_read(
    chromium: Browser, site: Path, name: str, scheme: str
) -> None:
    shown = opened(chromium, site / "site" / name, 390, scheme)
    shown.js("document.querySelectorAll('details').forEach(fold => fold.open = true)")
    assert shown.js(NAMELESS) == []
    assert shown.js(FAINT) == []
    assert shown.js("document.documentElement.scrollWidth <= innerWidth")
    assert shown.errors == []


def test_on_a_phone_what_a_word_means_stands_below_it(chromium: Browser, site: Path) -> None:
    shown = opened(chromium, site / "site" / "glossary.html", 390)
    assert shown.js("document.querySelectorAll('.table').length") > 0
    assert shown.js(
        "[...document.querySelectorAll('.table')].every(e => e.scrollWidth <= e.clientWidth)"
    )


REACHED = """window.reached = [...document.querySelectorAll(
  'a[href], button, select, input, summary, [tabindex="0"], .picture')].filter(e =>
    e.checkVisibility() && (!e.matches('.picture') || e.scrollWidth > e.clientWidth));
  window.focused = () => { const e = document.activeElement, r = e.getBoundingClientRect();
    return [window.reached.indexOf(e), getComputedStyle(e).outlineStyle !== 'none'
      && r.bottom > 0 && r.top < innerHeight && r.right > 0 && r.left < innerWidth]; };
  window.reached.length"""


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("page", ["lesson", "run"])
def test_everything_is_reached_in_order_by_tab_and_seen_where_it_is(
    chromium: Browser, site: Path, page: str, width: int
) -> None:
    """Every link, button, field, fold, table, and picture that scrolls, once."""
    of_run = of(site, RUNS[1])
    path = site / "site" / "lessons" / f"{RUNS[1]}.html" if page == "lesson" else of_run
    shown = opened(chromium, path, width)
    count = shown.js(REACHED)
    assert count > 30
    bar = (
        "[...document.querySelectorAll('.bar a, .bar button')].map(e => e.getBoundingClientRect())"
    )
    assert shown.js(f"{bar}.every(r => r.left >= 0 && r.right <= innerWidth)"), "it is cut off"
    places: list[int] = []
    for _ in range(count):
        shown.press("Tab")
        place, seen = shown.js("window.focused()")
        assert seen, shown.js("document.activeElement.outerHTML.slice(0, 200)")
        places.append(place)
    assert places == list(range(count))


def test_a_lesson_is_taken_with_the_keyboard_alone(chromium: Browser, site: Path) -> None:
    """Skip to the guess, make it, and open what was measured."""
    shown = opened(chromium, site / "site" / "lessons" / f"{RUNS[1]}.html")
    shown.press("Tab")
    shown.press("Enter")
    assert shown.js("location.hash") == "#guess"
    shown.press("Tab")
    assert shown.js("document.activeElement.matches('.guesses button')")
    shown.press("Enter")
    assert shown.js("document.getElementById('guessed').innerText.length") > 0
    while not shown.js("document.activeElement.matches('#verdict summary')"):
        shown.press("Tab")
    assert not shown.js("document.activeElement.parentElement.open")
    shown.press("Enter")
    assert shown.js("document.activeElement.parentElement.open")
    assert shown.errors == []


def test_claims_are_coloured_by_verdict_or_by_how_near_the_prediction_came(
    chromium: Browser, site: Path
) -> None:
    shown = opened(chromium, site / "site" / "machines.html", 390)
    cell = "getComputedStyle(document.querySelector('td.verdict:not(.off-none)')).backgroundColor"
    before = shown.js(cell)
    shown.js("document.getElementById('by-distance').focus()")
    shown.press(" ")
    assert shown.js(cell) != before
    legends = (
        "['of-verdict', 'of-distance'].map(n => document.querySelector(`.${n}`).offsetHeight > 0)"
    )
    assert shown.js(legends) == [False, True]
    assert shown.js(FAINT) == []
    assert shown.errors == []


def test_a_lesson_without_scripts_has_its_text_picture_and_answer(
    chromium: Browser, site: Path
) -> None:
    shown = Page(chromium, 390, 900)
    shown.call("Emulation.setScriptExecutionDisabled", value=True)
    shown.open(site / "site" / "lessons" / f"{RUNS[0]}.html")
    assert shown.js("document.querySelectorAll('svg.replay').length") == 2
    assert shown.js("document.querySelectorAll('#revealed li').length") == 1
    assert not shown.js(
        "[...document.querySelectorAll('.drawn')].some(e => e.getClientRects().length)"
    )
    assert shown.errors == []


def test_the_planner_says_what_fits_and_what_does_not(chromium: Browser, site: Path) -> None:
    shown = opened(chromium, site / "site" / "planner.html", 390)
    answer = "document.getElementById('answer').innerText"
    assert shown.js(answer).startswith("It fits: ")

    def given(name: str, value: str) -> None:
        shown.js(f"(e => {{ e.value = {value!r}; e.dispatchEvent(new Event('input',"
                 f" {{bubbles: true}})); }})(document.querySelector('[name={name}]'))")  # fmt: skip

    assert "make plan MACHINE=" in shown.js("document.getElementById('flags').innerText")
    given("users", "4096")
    assert "the others wait in the queue" in shown.js(answer)
    for name, value in (("users", "0.0001"), ("prompt", "-5")):
        given(name, value)
        assert "from 1 to" in shown.js(answer)  # refused, and nothing is computed from another
        assert not shown.js("document.getElementById('planned').checkVisibility()")
        given(name, "128")
    assert shown.js(answer).startswith("It fits: ")
    options = shown.js("[...document.querySelector('[name=machine]').options].map(o => o.text)")
    given("machine", str(options.index("L4")))
    models = shown.js("[...document.querySelector('[name=model]').options].map(o => o.text)")
    given("model", str(next(i for i, name in enumerate(models) if "experts" in name)))
    assert "does not fit" in shown.js(answer)
    assert "It fits with weights in " in shown.js(answer)
    assert "tok" not in shown.js("document.getElementById('flags').innerText")  # no rate
    assert "it does not fit" in shown.js("document.getElementById('planned').innerText")
    assert shown.js("document.documentElement.scrollWidth <= innerWidth")
    assert shown.errors == []


CLICK = """(words => { const found = [...document.querySelectorAll('a, summary')]
  .find(e => e.innerText.includes(words) && e.checkVisibility());
  found?.click();
  return Boolean(found); })"""
READ = """(words => [...document.querySelectorAll('p, li, td, dd')]
  .filter(e => e.checkVisibility()).map(e => e.closest('tr, dl, p, li').innerText)
  .some(text => words.every(w => text.includes(w))))"""
QUESTIONS_OF_READERS = {
    "What does “inconclusive” mean?": (
        ["Continuous batching", "What the words mean"],
        ["inconclusive", "the repeats vary too much to tell"],
    ),
    "What did continuous batching gain, as measured?": (
        ["Questions", "What does continuous batching gain over static batching?"],
        ["place at once gave", "the throughput where lengths vary"],
    ),
    "Does a model of 70 B parameters fit one H100?": (
        ["Plan"],
        ["H100", "Llama 3.1 70B", "does not fit"],
    ),
    "What is TPOT?": (["Glossary"], ["TPOT", "Time per output token of a request"]),
}


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("question", QUESTIONS_OF_READERS)
def test_a_question_of_a_reader_is_answered_within_two_clicks(
    chromium: Browser, site: Path, question: str, width: int
) -> None:
    clicks, answer = QUESTIONS_OF_READERS[question]
    shown = opened(chromium, site / "site" / "index.html", width)
    told = f"{READ}({json.dumps(answer)})"
    assert not shown.js(told)
    for words in clicks:
        shown.wait(f"{CLICK}({json.dumps(words)})")  # a page takes a moment to come
    shown.wait(told)
    assert len(clicks) <= 2
    assert shown.errors == []
