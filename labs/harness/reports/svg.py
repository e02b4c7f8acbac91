"""Makes the SVG of matplotlib smaller by what nobody sees: each plot of each run is on file."""

from __future__ import annotations

import re

DECIMALS = 2  # of a coordinate, in points
METADATA = re.compile(r" *<metadata>.*?</metadata>\n", re.DOTALL)
INDENT = re.compile(r"^ +(?=<)", re.MULTILINE)
COORDINATES = re.compile(r'(?<= )(?:d|x|y|points|transform)="[^"]*"')
LONG_NUMBER = re.compile(rf"-?\d+\.\d{{{DECIMALS + 1},}}")
NO_ROTATION = re.compile(r' transform="rotate\(-?0 [^"]*\)"')
NAME = re.compile(r' id="([^"]*)"')
USED_NAME = re.compile(r"#([\w.-]+)")
EMPTY_GROUP = re.compile(r"<g/>\n|<g>\n</g>\n")
GROUP_OF_ONE = re.compile(r"<g>\n(<(?:use|path|text|image) [^\n]*\n)</g>\n")
FONT = "font-family: 'DejaVu Sans', 'Verdana', sans-serif"
NESTED = 3  # groups around one shape, at most


def compact(svg: str) -> str:
    """Round coordinates, and drop metadata, indents, names that nothing uses and idle groups."""
    svg = INDENT.sub("", METADATA.sub("", svg))
    svg = NO_ROTATION.sub("", COORDINATES.sub(_rounded, svg))
    used = set(USED_NAME.findall(svg))
    svg = NAME.sub(lambda name: name[0] if name[1] in used else "", svg)
    for _ in range(NESTED):
        svg = GROUP_OF_ONE.sub(r"\1", EMPTY_GROUP.sub("", svg))
    return _with_one_font(svg)


def _with_one_font(svg: str) -> str:
    """Name the font of all texts once."""
    of_a_text = f"; {FONT}"
    if of_a_text not in svg:
        return svg
    return svg.replace(of_a_text, "").replace("</style>", f" text{{{FONT}}}</style>", 1)


def _rounded(attribute: re.Match[str]) -> str:
    on_one_line = re.sub(r" *\n", " ", attribute[0]).replace(' "', '"')
    return LONG_NUMBER.sub(lambda number: _short(float(number[0])), on_one_line)


def _short(number: float) -> str:
    return f"{number:.{DECIMALS}f}".rstrip("0").rstrip(".")
