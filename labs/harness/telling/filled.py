"""Fill a page of `texts/` with what is known: its words stand in Markdown, its figures come here.

What is filled in is text, whose marks are escaped, unless it is Markdown already, as a table is.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from labs.harness.judging.text import number
from labs.harness.telling import markdown
from labs.harness.telling.markdown import Markdown
from labs.harness.telling.tables import with_band

TEXTS = Path(__file__).parent / "texts"


def filled(text: str, **known: Any) -> Markdown:
    """Fill the page `texts/<text>.md`; blocks of which nothing is left leave no gap."""
    written = _texts().get_template(f"{text}.md").render(known)
    return Markdown(re.sub(r"\n{3,}", "\n\n", written).strip())


@cache
def _texts() -> jinja2.Environment:
    texts = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEXTS),
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: value if isinstance(value, Markdown) else _escaped(value),
    )
    texts.filters["shown"] = lambda value, form: format(value, form)
    texts.filters["gb"] = lambda value: f"{value / 1e9:.1f} GB"
    texts.filters["quantity"] = number
    texts.filters["band"] = with_band
    return texts


def _escaped(value: object) -> object:
    return markdown.inline(value) if isinstance(value, str) else value
