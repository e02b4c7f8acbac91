"""Write a run as one HTML file that needs no server.

The words and tables are the report's, from the same document; added is what paper cannot do:
tables that sort, the distributions behind the percentiles, figures over the load, every request of
a trial on a timeline. A page loads nothing from anywhere, and its content security policy forbids
it: only the scripts it was written with run, whatever a model's name or an error message holds.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from labs import LABS
from labs.harness.reports import chart_data, html, report
from labs.harness.reports.document import Figure, parts, plain_text
from labs.harness.spec.visible import visible, visible_data
from labs.harness.storage.recorded import Run
from labs.harness.storage.results import RunFolder
from serving import atomic

WEB = Path(__file__).parent / "web"
PLOTLY, STYLE, RUN_SCRIPT = "plotly.min.js", "page.css", "run.js"  # the files of a site
LESSONS = "lessons"  # the folder of a site with a page for each lab
RUN_SCRIPTS = (
    "page.js", "plot.js", "run.js", "ratios.js", "distributions.js", "figures.js", "requests.js",
)  # fmt: skip
ANSWER, CLAIMS = "the-answer", "claim-by-claim"  # the section after which stands what scripts draw
DRAWN_HERE = ("effects", "sweep", "variants")  # whose SVG is shown only where no script runs


def write(folder: RunFolder, figures: Sequence[Figure] | None = None) -> Path:
    """Write report.html beside report.md; the file holds all that it shows."""
    return atomic.write(folder.path / "report.html", page(folder, figures=figures))


def page(
    folder: RunFolder,
    root: str = "",
    most_requests: int = chart_data.REQUESTS_OF_A_PAGE,
    figures: Sequence[Figure] | None = None,
) -> str:
    """Render a run's page; the library is in it, or at the `root` of a site, beside the index.

    Unless `figures` are given, which `report.draw` has
    drawn, the plots are drawn again, for their captions.
    """
    from labs.harness.reports import plots  # imports matplotlib, which few commands draw with

    facts = report.Facts.of(folder)
    run, summary = facts.run, facts.summary
    if figures is None:
        figures = plots.draw(folder, facts.lab, facts.points, summary, save=False)
    document = report.document(facts, figures)
    picture = _picture(folder)
    code = web(*RUN_SCRIPTS)
    sections = html.sections(document, picture)
    own = [name for f in figures if (name := Path(f.file).stem) != report.EFFECTS]
    is_the_picture = not own or own[0] in DRAWN_HERE  # of the answer, in the place of an SVG
    claims_come_first = any(section.id == CLAIMS for section in sections)
    return render(
        "run.html",
        scripts={PLOTLY: get_plotlyjs(), RUN_SCRIPT: code},
        root=root,
        lesson=f"{LESSONS}/{facts.lab.name}.html" if facts.lab.name in LABS else "",
        title=plain_text(parts(document)[0]),
        intro=html.introduction(document, picture),
        sections=sections,
        drawn_after=CLAIMS if claims_come_first else sections[0].id,
        claims_after=ANSWER if is_the_picture and sections[0].id == ANSWER else CLAIMS,
        marks=marks_of(run, not summary.failed and not summary.missing),  # COMPLETE comes last
        data=chart_data.data(folder, run, summary, most_requests),
    )


def _picture(folder: RunFolder) -> html.Picture:
    """Show the run's own pictures; those that scripts draw too, only where no script runs."""
    embedded = html.embedded(folder.path)

    def picture(file: str, words: str, caption: Markup) -> Markup:
        image = embedded(file, words, caption)
        drawn_here = Path(file).stem in DRAWN_HERE
        return Markup("<noscript>{}</noscript>").format(image) if drawn_here else image

    return picture


def render(template: str, scripts: Mapping[str, str], root: str = "", **fields: Any) -> str:
    """Render a template under a content security policy that allows these scripts alone.

    They are in the page, or, where there is a `root`, in files there of the names given.
    """
    allowed = "'self'" if root else " ".join(f"'{_hash(s)}'" for s in scripts.values())
    linked = " 'self'" if root else ""  # Plotly sets the style of what it draws
    policy = (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'{linked};"
        " img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
    page_template = _templates().get_template(template)
    return page_template.render(
        scripts={name: _Code(code) for name, code in scripts.items()},
        policy=Markup(policy),
        css=Markup(web("page.css")),
        style=STYLE,
        root=root,
        **fields,
    )


def svg(template: str, **fields: Any) -> Markup:
    """Render a picture that stands within a page."""
    return Markup(_templates().get_template(template).render(fields).replace("\n", ""))


@cache
def _templates() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(WEB), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, finalize=_visible_text,
    )  # fmt: skip
    environment.policies["json.dumps_function"] = as_json
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}  # and the order as it is
    return environment


class _Code(Markup):
    """A script, which has to stay what its hash was computed of."""


def _visible_text(value: Any) -> Any:
    """Filter what a template writes: text, and markup, where nothing left out is a part of it."""
    return visible(value) if isinstance(value, str) and not isinstance(value, _Code) else value


def as_json(data: Any, **options: Any) -> str:
    """Write what a page's scripts are given."""
    return json.dumps(visible_data(data), **options)


def _hash(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def script_hashes() -> list[str]:
    """Return the hashes of the scripts within a run's page, for a content security policy."""
    return [_hash(script) for script in (get_plotlyjs(), web(*RUN_SCRIPTS))]


@cache
def web(*names: str) -> str:
    return "".join((WEB / name).read_text() for name in names)


def marks_of(run: Run, complete: bool) -> list[str]:
    """Mark what sets a run apart from an ordinary one."""
    known = {
        "random weights": run.dummy,
        "quick": run.quick,
        "A/A": run.aa,
        "ad hoc": run.ad_hoc and not run.aa,
        "repetition": bool(run.reproduces),
        "not complete": not complete,
    }
    return [mark for mark, is_so in known.items() if is_so]
