"""Pictures in pages: short, and showing what the file shows."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from urllib.parse import unquote

import pytest

from labs.harness.facts.drawing import plt
from labs.harness.telling import pictures

NAMESPACE = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def svg(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A drawing with lines, bars, dots and text that tries to be more than text."""
    figure, ax = plt.subplots()
    ax.plot([1, 2, 3], [1.234567, 2, 1], "o-", label='<b>"it\'s" & more</b>')
    ax.bar(range(20), range(20), color="#0072B2")
    ax.errorbar([1], [2], yerr=[[0.5], [0.5]], fmt="D", label="measured")  # in the legend, <g/>
    ax.legend()
    path = tmp_path_factory.mktemp("drawn") / "a.svg"
    figure.savefig(path)
    plt.close(figure)
    return path.read_text()


def marks(svg: str) -> list[str]:
    """The kinds of all marks in their order; paths may be drawn as one."""
    kinds = (found.tag.removeprefix(NAMESPACE) for found in ElementTree.fromstring(svg).iter())
    return [kind for kind in kinds if kind in ("use", "text", "clipPath", "rect")]


def test_what_is_named_is_found_by_its_name(svg: str) -> None:
    lighter = pictures.lighter(svg)
    used = set(re.findall(r"(?:url\(|href=')#([a-z]+)", lighter))
    assert used
    assert used <= set(re.findall(r" id='([a-z]+)'", lighter))


def test_paths_that_shine_through_stay_apart() -> None:
    solid, faint = (f'<path d="M 0 0" style="fill: red{more}"/>' for more in ("", "; opacity: 0.5"))
    drawn = pictures.lighter(f"<svg><metadata>Matplotlib</metadata>{solid * 2}{faint * 2}</svg>")
    assert drawn.count("<path") == 3


def texts(svg: str) -> list[str]:
    return [t for t in ("".join(e.itertext()) for e in ElementTree.fromstring(svg).iter(
        f"{NAMESPACE}text")) if t]  # fmt: skip


def test_text_of_a_plot_is_text(svg: str) -> None:
    assert '<b>"it\'s" & more</b>' in texts(svg)


def test_a_lighter_picture_has_the_same_marks_in_the_same_places(svg: str) -> None:
    lighter = pictures.lighter(svg)
    assert len(lighter) < 0.5 * len(svg)
    assert marks(lighter) == marks(svg)
    assert texts(lighter) == texts(svg)
    full, short = (
        {float(f"{float(v):.1f}") for path in re.findall(r" d=['\"]([^'\"]+)", drawn)
         for v in re.findall(r"-?\d+\.?\d*", path)}
        for drawn in (svg, lighter)
    )  # fmt: skip
    assert all(min(abs(one - other) for other in full) < 0.11 for one in short)
    assert all(min(abs(one - other) for other in short) < 0.11 for one in full)


def test_boxes_and_straight_lines_take_one_number_an_end() -> None:
    box = "M 1.0 2.0 L 3.0 2.0 L 3.0 4.0 L 1.0 4.0 z"
    for path, short in (
        (f"{box} {box}", "M1.0 2.0H3.0V4.0H1.0zM1.0 2.0H3.0V4.0H1.0z"),
        ("M 1.0 2.0 L 3.0 2.0 ", "M1.0 2.0H3.0"),
        ("M 1.0 2.0 L 1.0 4.0 ", "M1.0 2.0V4.0"),
        ("M 1.0 2.0 L 3.0 4.0 L 5.0 6.0 ", "M1.0 2.0L3.0 4.0L5.0 6.0"),
        ("M 1.0 2.0 L 3.0 2.0 L 5.0 6.0 ", "M1.0 2.0H3.0L5.0 6.0"),
    ):
        drawn = pictures.lighter(f'<svg><metadata>Matplotlib</metadata><path d="{path}"/></svg>')
        assert f"d='{short}'" in drawn


def test_a_style_that_is_used_often_is_written_once_and_still_holds(svg: str) -> None:
    lighter = pictures.lighter(svg)
    rules = dict(re.findall(r"\.([a-z]+)\{([^}]*)\}", lighter))
    (name,) = (name for name, rule in rules.items() if "text-anchor:middle" in rule)
    assert len(re.findall(rf"class='{name}'", lighter)) >= 5
    assert set(re.findall(r"class='([a-z]+)'", lighter)) == rules.keys()


def test_an_address_ends_at_no_character_of_the_picture(svg: str) -> None:
    address = pictures.as_address(svg)
    assert not set(address) & set('"&#\n')
    assert unquote(address) == "data:image/svg+xml," + pictures.lighter(svg)


def test_a_picture_of_another_origin_is_left_alone(tmp_path: Path) -> None:
    other = '<svg xmlns="http://www.w3.org/2000/svg"><g><!-- a --><path d="M1.23456 0"/></g></svg>'
    assert pictures.lighter(other) == other
