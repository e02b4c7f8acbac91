"""The pages of labs: all words, no arithmetic, no figure that a run would have to measure."""

from __future__ import annotations

import re

import jinja2
import pytest
from jinja2 import nodes

from labs import LABS
from labs.harness.analysis.quantity import CHANGE, POINTS, Quantity
from labs.harness.derived.lab_modules import own_plots
from labs.harness.reports.templates import FOLDERS, SHARED, filled_text
from labs.harness.site.answers import on_a_gpu
from labs.harness.spec.page import (
    ANSWERS,
    FINDINGS,
    GPU,
    PLOTS,
    WORKSHEET,
    PageError,
    page_of,
    read,
)
from tests.cases import each

PAGES = {name: page for name in LABS if (page := page_of(name))}
NO_PROSE = re.compile(r"\{\{.*?\}\}|\{%.*?%\}|\{#.*?#\}|`[^`]*`|95%", re.S)
MEASURED = re.compile(r"\d[\d,.]*\s?(x|%|ms|s|tok/s|req/s|GB/s|TFLOP/s)(?![\w-])")
FILLED = (ANSWERS, FINDINGS, PLOTS)
TEMPLATES, _, COMPARING = FOLDERS
INCLUDED = {path.name: path.read_text() for path in SHARED.glob("*.md")}


def parts(name: str) -> dict[str, str]:
    own = {
        f"{section}/{part}": of.text
        for section in FILLED
        for part, of in PAGES[name][section].parts.items()
    }
    return own | INCLUDED | {WORKSHEET: PAGES[name][WORKSHEET].text}


@pytest.mark.parametrize("name", PAGES)
def test_every_part_of_a_lab_has_its_words(name: str) -> None:
    lab, page = LABS[name], PAGES[name]
    assert page[ANSWERS].parts.keys() == set(lab.answers)
    assert page[FINDINGS].parts.keys() == set(lab.findings)
    assert all(part.title for part in page[FINDINGS].parts.values())
    assert page[PLOTS].parts.keys() == own_plots(name).keys()
    assert all(claim.title for claim in lab.claims)
    assert all(c["title"] for of in lab.scales.values() for c in of.get("claims", ()))
    assert all(page.how_it_works)


@pytest.mark.parametrize("name", PAGES)
def test_no_figure_is_typed_into_what_a_run_says(name: str) -> None:
    for part, text in parts(name).items():
        assert not MEASURED.search(NO_PROSE.sub("", text)), part


@pytest.mark.parametrize("name", PAGES)
def test_a_page_computes_and_compares_no_numbers(name: str) -> None:
    """It branches on states: on yes and no, and on the names of states."""
    arithmetic = (nodes.Add, nodes.Sub, nodes.Mul, nodes.Div, nodes.FloorDiv, nodes.Mod, nodes.Pow)
    for part, text in parts(name).items():
        tree = jinja2.Environment(autoescape=True).parse(text)
        assert not list(tree.find_all(arithmetic)), part
        for compared in tree.find_all(nodes.Compare):
            sides = [op.expr for op in compared.ops]
            assert all(isinstance(s, nodes.Const) and isinstance(s.value, str) for s in sides), part


COMPUTED = {path.stem: path.read_text() for path in TEMPLATES.glob("computed_*.md")}
SAID = COMPUTED | {
    f"{name}/{id}": part.text
    for name, page in PAGES.items()
    for id, part in page[ANSWERS].parts.items()
}


@each("said", SAID)
def test_an_answer_is_75_words_before_its_fold(said: str) -> None:
    """A figure counts as one word, whatever its interval; of branches the longest counts."""
    before, fold, _ = SAID[said].partition("<details>")
    assert fold or said not in COMPUTED
    branches = re.split(r"\{%\s*(?:el(?:se|if)|endif)[^%]*%\}", before)
    plain = [re.sub(r"\{%.*?%\}", "", branch, flags=re.S) for branch in branches]
    words = [len(re.sub(r"\{\{.*?\}\}", "figure", text, flags=re.S).split()) for text in plain]
    assert max(words) <= 75


def test_every_question_that_labs_answer_says_what_a_gpu_would_change() -> None:
    asked = {id for lab in LABS.values() for id in lab.answers}
    assert {id for id in asked if not on_a_gpu(id)} == set()
    assert {id for page in PAGES.values() for id in page[GPU].named} == asked


PAGE = """# Beads

Does counting help?

## Answers

### SO-4

It helps: {{ gain }}.

<details>
<summary>More</summary>

- With two, {{ two }}.
- With three, {{ lost }}.

| Beads | Gain |
| --- | --- |
| two | {{ two }} |
| three | {{ lost }} |

</details>

### SO-5

Never: {{ lost }}.

<details>
<summary>More</summary>

{{ lost }}

</details>
"""
KNOWN = {
    "gain": Quantity(2, "x", 1.5, 2.5),
    "two": Quantity(0.5, "s"),
    "lost": Quantity.missing("no `bead`"),
}


def test_what_lacks_a_quantity_is_left_out_and_says_why() -> None:
    answers = read(PAGE)[ANSWERS].parts
    text, _ = filled_text(answers["SO-4"].text, KNOWN)
    assert text.startswith("It helps: 2.00x (1.50 to 2.50).")
    assert text.count("- With") == 1
    assert "| two | 500 ms |\n| three | – |" in text
    text, why = filled_text(answers["SO-5"].text, KNOWN)
    assert text == ""
    assert why == r"no \`bead\`"


def test_nothing_from_outside_is_markup() -> None:
    hostile = "# *a* | <b> [c](d)\n\n- `e` \ue000f\ue001"
    text, _ = filled_text("{{ name }} and {{ name }}", {"name": hostile})
    assert text.count("\n") == 0
    assert r"\*a\*" in text
    assert r"\|" in text
    assert r"\<b>" in text


@pytest.mark.parametrize("text", ["B?", "# A\n", "# A\n\nB?\n\n## Abacus\n"])
def test_a_page_that_is_none_says_so(text: str) -> None:
    with pytest.raises(PageError):
        read(text)


def test_quantities_keep_their_intervals_by_plain_factors_alone() -> None:
    two = Quantity(2.0, "s", 1.0, 4.0)
    assert (2 * two).high == 8
    assert (two / 2).low == 0.5
    assert (two * -1).low == -4
    ratio = two / Quantity(1.0, "s", 0.9, 1.1)
    assert (ratio.value, ratio.unit, ratio.low) == (2, "x", None)
    assert (ratio.change.value, str(ratio.change)) == (1, "+100%")
    missing = Quantity.missing("broken", "s")
    assert (two / missing).why == (missing + 1).why == "broken"
    assert not (two / 0).known
    assert str(missing) == "–"
    assert str(Quantity(-0.2, POINTS, -0.348, 0.027)) == "-20 (-34.8 to +2.7) points"
    assert str(Quantity(0.0172, CHANGE)) == "+1.7%"
