"""Pictures within pages: an SVG of matplotlib as an address that holds it, as short as it can be.

Matplotlib writes each mark in a group of its own, with its style and six decimals. What no eye can
see of that is left out; a picture of another origin is taken as it is. A page shows it as an image,
so whatever a file holds, nothing in it runs.
"""

from __future__ import annotations

import re
from collections import Counter
from string import ascii_lowercase
from urllib.parse import quote

ORIGIN = "Matplotlib"  # as its metadata say
UNQUOTED = " !$'()*+,-./:;<=>?@[]_~{}|^"  # in a data address within double quotation marks
UNSEEN = re.compile(
    r"<metadata>.*?</metadata>|<!--.*?-->|<!DOCTYPE.*?>|<\?xml.*?\?>"
    r'| transform="rotate\(-0 [^"]*"',
    re.DOTALL,
)
PLACES = re.compile(r'(?<= [dxy]=")[^"]+|(?<=translate\()[^)]+')  # paths and positions
FINE = re.compile(r"(\.\d)\d+")  # a tenth of a point is enough
PATH = re.compile(r'(?<= d=")[^"]+')
BOX = re.compile(r"M (\S+) (\S+) L (\S+) \2 L \3 (\S+) L \1 \4 z")
LEVEL, UPRIGHT = re.compile(r"M (\S+) (\S+) L (\S+) \2 "), re.compile(r"M (\S+) (\S+) L \1 (\S+) ")
STYLE = re.compile(r' style="([^"]*)"')
GROUP = re.compile(r"<g\b[^>]*>|</g>")
TAG = re.compile(r"<[^>]+>")
NAMES = re.compile(r'(?<= id=")[^"]+|(?<=[("]#)[^")]+')  # where they are given, where they are used
ALIKE = re.compile(r'<path d="[^"]*"(?P<rest>[^<>]*)/>(?:<path d="[^"]*"(?P=rest)/>)+')
LEAST_USES = 3  # of a style that is worth a class


def as_address(svg: str) -> str:
    """Return a picture as an address for an attribute within double quotation marks."""
    return "data:image/svg+xml," + quote(lighter(svg), safe=UNQUOTED)


def lighter(svg: str) -> str:
    """Return a picture of matplotlib that looks the same and takes a fraction of the bytes."""
    if ORIGIN not in svg:
        return svg
    drawn = PLACES.sub(lambda match: FINE.sub(r"\1", match[0]), UNSEEN.sub("", svg))
    drawn = re.sub(r">\s+<", "><", re.sub(r"\s+", " ", drawn)).strip()
    drawn = PATH.sub(_shorter, drawn)
    drawn = _without_bare_groups(re.sub(r'<g id="[^"]*"', "<g", drawn))
    drawn = _with_classes(_with_short_names(ALIKE.sub(_joined, drawn)))
    return TAG.sub(lambda tag: tag[0] if "'" in tag[0] else tag[0].replace('"', "'"), drawn)


def _without_bare_groups(svg: str) -> str:
    """Remove the groups that say nothing; what they hold stays."""
    bare: list[bool] = []  # of the groups that are open

    def kept(tag: re.Match[str]) -> str:
        if tag[0].endswith("/>"):  # it holds nothing, as the caps of an error bar in a legend
            return ""
        if tag[0] != "</g>":
            bare.append(tag[0] == "<g>")
            return "" if bare[-1] else tag[0]
        return "" if bare and bare.pop() else tag[0]

    return GROUP.sub(kept, svg)


def _shorter(path: re.Match[str]) -> str:
    """Write boxes, level and upright lines by the one number that each of their ends adds."""
    drawn = BOX.sub(r"M \1 \2 H \3 V \4 H \1 z", path[0])
    drawn = UPRIGHT.sub(r"M \1 \2 V \3 ", LEVEL.sub(r"M \1 \2 H \3 ", drawn))
    return re.sub(r" ?([A-Za-z]) ?", r"\1", drawn).strip()


def _joined(alike: re.Match[str]) -> str:
    """Draw paths of one style that follow one another as one, unless one may shine through."""
    if "opacity" in alike["rest"] or " id=" in alike["rest"]:
        return alike[0]
    places = "".join(re.findall(r' d="([^"]*)"', alike[0]))
    return f'<path d="{places}"{alike["rest"]}/>'


def _with_short_names(svg: str) -> str:
    given = dict.fromkeys(re.findall(r' id="([^"]+)"', svg))
    short = {name: _name(place) for place, name in enumerate(given)}
    return NAMES.sub(lambda match: short.get(match[0], match[0]), svg)


def _with_classes(svg: str) -> str:
    """Write a style that many marks have once."""
    uses = Counter(STYLE.findall(svg))
    shared = [style for style, count in uses.most_common() if count >= LEAST_USES]
    names = {style: _name(place) for place, style in enumerate(shared)}
    rules = "".join(f".{name}{{{_unquoted(style)}}}" for style, name in names.items())

    def classed(match: re.Match[str]) -> str:
        name = names.get(match[1])
        return f' class="{name}"' if name else f' style="{_unquoted(match[1])}"'

    drawn = STYLE.sub(classed, svg)
    return drawn.replace("</style>", f"{rules}</style>", 1) if rules else drawn


def _name(place: int) -> str:
    """Name the classes a, b, .. z, aa, ab, .."""
    rest, last = divmod(place, len(ascii_lowercase))
    return (_name(rest - 1) if rest else "") + ascii_lowercase[last]


def _unquoted(style: str) -> str:
    """Leave out what CSS does not need: blanks, and quotation marks around names of fonts."""
    return re.sub(r"([:;]) ", r"\1", style.replace("'", ""))
