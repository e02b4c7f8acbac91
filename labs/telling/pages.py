"""Write a run as one HTML file that needs no server, and all recorded runs as a site.

The words and tables are the report's, from the same document; added is what paper cannot do:
tables that sort, the distributions behind the percentiles, figures over the load, every request of
a trial on a timeline. A page loads nothing from anywhere, and its content security policy forbids
it: only the scripts it was written with run, whatever a model's name or an error message holds.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections import Counter
from collections.abc import Sequence, Set
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from labs.filing.results import Run, RunFolder, Summary, all_runs
from labs.judging.text import ceilings_text, decided_text, predictions_text, ratio_text
from labs.questions import QUESTIONS
from labs.telling import chart_data, html, plots, report
from labs.telling.document import Figure, parse, plain_text
from serving import whole

WEB = Path(__file__).parent / "web"
PLOTLY = "plotly.min.js"
RUN_SCRIPTS = (
    "page.js", "plot.js", "run.js", "ratios.js", "distributions.js", "figures.js", "requests.js",
)  # fmt: skip
RUN_PAGE = re.compile(r"\d{8}T\d{6}Z-\w+\.html")
CLAIMS = "claim-by-claim"  # the section after which stands what scripts draw
DRAWN_HERE = ("effects", "sweep", "variants")  # whose SVG is shown only where no script runs


# ------------------------------------------------------------------------------------- the pages


def write(folder: RunFolder) -> Path:
    """Write report.html beside report.md; the file holds all that it shows."""
    return whole.write(folder.path / "report.html", page(folder))


def write_site(out: Path) -> tuple[Path, dict[str, str]]:
    """Write an index, a page for each run and one copy of the library.

    Returns the index and the runs that cannot be read, each with the reason.
    """
    entries: list[Entry] = []
    left_out: dict[str, str] = {}
    whole.write(out / PLOTLY, get_plotlyjs())
    for folder in all_runs():
        machine, lab, name = folder.path.parts[-3:]
        try:
            href = f"{machine}/{lab}/{name}.html"
            whole.write(out / href, page(folder, root="../../"))
            entries.append(Entry(folder, folder.run(), folder.summary(), href))
        except (OSError, ValueError, KeyError, TypeError) as error:
            left_out[f"{machine}/{lab}/{name}"] = str(error).splitlines()[0]
    _remove_stale(out, {out / e.href for e in entries})
    return whole.write(out / "index.html", index(entries)), left_out


def _remove_stale(out: Path, pages: Set[Path]) -> None:
    """Remove the pages of runs that were removed or can no longer be read."""
    for path in out.glob("*/*/*.html"):
        if path not in pages and RUN_PAGE.fullmatch(path.name):
            path.unlink()


def page(folder: RunFolder, root: str = "") -> str:
    """Render a run's page; the library is in it, or at the `root` of a site, beside the index."""
    facts = report.Facts.of(folder)
    run, summary = facts.run, facts.summary
    figures = plots.draw(folder, facts.lab, facts.points, summary, save=False)
    document = report.document(facts, figures)
    picture = _picture(folder)
    code = web(*RUN_SCRIPTS)
    sections = html.sections(document, picture)
    claims_come_first = any(section.id == CLAIMS for section in sections)
    return render(
        "run.html",
        scripts=[code] if root else [get_plotlyjs(), code],
        root=root,
        title=plain_text(document.title),
        intro=html.introduction(document, picture),
        sections=sections,
        drawn_after=CLAIMS if claims_come_first else sections[0].id,
        marks=_marks(run, not summary.failed and not summary.missing),  # COMPLETE comes last
        data=chart_data.data(folder, run, summary),
    )


def _picture(folder: RunFolder) -> html.Picture:
    """Show the run's own pictures; those that scripts draw too, only where no script runs."""
    embedded = html.embedded(folder.path)

    def picture(figure: Figure) -> Markup:
        shown = embedded(figure)
        drawn_here = Path(figure.file).stem in DRAWN_HERE
        return Markup("<noscript>{}</noscript>").format(shown) if drawn_here else shown

    return picture


def render(template: str, scripts: Sequence[str], root: str = "", **fields: Any) -> str:
    """Render a template under a content security policy that allows these scripts alone."""
    hashes = (base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts)
    allowed = " ".join([*(f"'sha256-{h}'" for h in hashes), *(["'self'"] if root else [])])
    policy = (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline';"
        " img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
    page_template = _templates().get_template(template)
    return page_template.render(
        scripts=[Markup(s) for s in scripts],
        policy=Markup(policy),
        css=Markup(web("page.css")),
        plotly=PLOTLY,
        root=root,
        **fields,
    )


@cache
def _templates() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(WEB), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}  # and the order as it is
    return environment


@cache
def web(*names: str) -> str:
    return "".join((WEB / name).read_text() for name in names)


def _marks(run: Run, complete: bool) -> list[str]:
    """Mark what sets a run apart from an ordinary one."""
    known = {
        "random weights": run.dummy,
        "quick": run.quick,
        "A/A": run.aa,
        "ad hoc": run.ad_hoc and not run.aa,
        "not complete": not complete,
    }
    return [mark for mark, is_so in known.items() if is_so]


# --------------------------------------------------------------------------------------- the index


@dataclass(frozen=True)
class Entry:
    """Holds a run and the address of its page."""

    folder: RunFolder
    run: Run
    summary: Summary
    href: str

    @property
    def lab(self) -> str:
        return str(self.run.lab["name"])

    @property
    def machine(self) -> str:
        return self.run.machine.describe()

    @property
    def vllm(self) -> str:
        return self.run.environment.vllm or "–"

    @property
    def marks(self) -> list[str]:
        return _marks(self.run, self.folder.complete)

    @property
    def decided(self) -> str:
        """Say how many claims are decided."""
        return decided_text(self.summary.judgements)

    @property
    def predictions(self) -> str:
        """Say what became of the predictions."""
        return predictions_text(self.summary.judgements)

    @property
    def outcomes(self) -> str:
        """Say how many verdicts of each kind there are."""
        count = Counter(j.outcome for j in self.summary.judgements)
        return ", ".join(f"{n} {outcome}" for outcome, n in count.items()) or "–"

    @property
    def first_decided(self) -> str:
        """Say in a few words how the first two decided claims came out."""
        decided = [j for j in self.summary.judgements if j.expected is not None][:2]
        claims = (f"{plain_text(parse(j.title))} ({ratio_text(j)}, {j.outcome})" for j in decided)
        return "; ".join(claims) or "nothing decided"


def index(entries: Sequence[Entry]) -> str:
    newest = {  # of each lab on each machine: the last one wins
        (e.machine, e.lab): e for e in entries if e.folder.complete and not e.run.ad_hoc
    }
    machines = {e.machine: e for e in entries}
    return render(
        "index.html",
        scripts=[web("page.js")],
        entries=entries[::-1],
        machines=[
            (name, ceilings_text(e.run.ceilings), sum(o.machine == name for o in entries))
            for name, e in machines.items()
        ],
        labs=sorted({e.lab for e in entries}),
        questions=[
            (id, question, [e for e in newest.values() if id in e.run.lab["answers"]])
            for id, question in QUESTIONS.items()
        ],
    )
