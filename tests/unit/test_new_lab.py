"""A lab is one file and one line: in a copy of the house a new one is added by just these.

Nothing else is touched, and the command line's checks, the reports, the README's course, the
Makefile's help and the tests take it. What it tells beyond its claims is one more file.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HOUSE = ("labs", "serving", "loadtests", "dashboards", "bench", "tests", "Makefile",
         "docs", "pyproject.toml", "README.md")  # fmt: skip
LINE = '        _lab("abacus_beads"),\n'
LAST = '        _lab("quantization_tools"),\n'
LAB = '''
"""Abacus beads: does a cached prefix spare counting?"""

from labs.lab import SLO, Arm, Claim, Evidence, Lab, Point, Prediction, Variant
from loadtests.arrivals import Concurrent
from loadtests.workload import Fixed, Workload
from serving import metrics

OFF = Variant(name="off", flags={"enable-prefix-caching": False})


def twice(treatment: Point, baseline: Point) -> Prediction:
    return Prediction(value=2.0, formula="by hand")


LAB = Lab(
    name="abacus-beads",
    title="Abacus beads",
    question="Does a cached prefix spare counting?",
    answers=("SO-4",),
    variants=(OFF, OFF.but("on", {"enable-prefix-caching": True})),
    flags={"max-model-len": 128},
    workloads=(
        Workload(
            name="short",
            prompt_tokens=Fixed(tokens=6),
            output_tokens=Fixed(tokens=4),
            loads=(Concurrent(users=1), Concurrent(users=2)),
        ),
    ),
    claims=(
        Claim(
            name="faster",
            title="On is faster",
            metric="output_tokens_per_s",
            treatment=Arm(variant="on"),
            baseline=Arm(variant="off"),
            expect="rises",
            predict=twice,
        ),
    ),
    evidence=(
        Evidence(arm=Arm(variant="on"), kind="rises", metric=metrics.PREFIX_HITS),
        Evidence(arm=Arm(variant="off"), kind="stays", metric=metrics.PREFIX_HITS),
    ),
    findings=FINDINGS,
    plots=PLOTS,
    slo=SLO(ttft_s=1, tpot_s=0.1),
    requests=8,
    warmup_s=1,
    window_s=4,
    repeats=2,
    most_repeats=0,
    limits={"cpu": "Beads of wood.", "gpu": "Beads of glass."},
    next_knobs=("SET=window_s=8 counts longer",),
)
'''
PLAIN = LAB.replace("FINDINGS", "()").replace("PLOTS", '("variants",)')
TELLING = LAB.replace("FINDINGS", '("beads",)').replace("PLOTS", '("variants", "rods")')
PARTS = '''
"""What the beads tell."""

from dataclasses import dataclass

from labs.filing.results import Finding
from labs.findings.context import Context, JudgedRun
from labs.findings.drawing import plt
from labs.findings.parts import Conclusion, ReportParts
from labs.findings.published import Published


@dataclass(frozen=True)
class Beads:
    counted: int


def count(context: Context) -> Beads:
    return Beads(counted=len(context.points))


def tell(facts: Beads) -> Finding:
    return Finding(title="How many beads?", lines=[f"There are {facts.counted}."])


BEADS = Conclusion("beads", count, tell)


def answer(run: JudgedRun) -> str | None:
    beads, ratio = BEADS.facts_of(run), run.ratio("faster")
    return f"With {beads.counted} beads: {ratio}." if beads and ratio else None


def draw_rods(run: JudgedRun) -> str | None:
    plt.plot([1, 2], [1, 2])
    return "The rods."


PARTS = ReportParts(
    conclusions=(BEADS,),
    answers={"SO-4": answer},
    plots={"rods": draw_rods},
    published={"claims": {"faster": (Published(figure="9x", source="Al-Khwarizmi, 820"),)}},
)
'''
TELLS = """
import sys
from pathlib import Path

from labs import LABS
from labs.comparing.leaderboards import generated_parts
from labs.running.resolve import require_known_names
from labs.telling import report
from tests.unit.builders import write_run

lab = LABS["abacus-beads"]
require_known_names(lab.at("cpu", quick=True))
folder = write_run(Path(sys.argv[1]), **dict(lab))
print(report.write(folder).read_text())
print("drawn:", *sorted(path.name for path in folder.path.glob("*.svg")))
print(generated_parts(Path("README.md").read_text(), []))
"""
TIERS = ("tests/cpu/test_labs.py", "tests/fake/test_run.py", "tests/gpu/test_labs.py")
TESTS = """
import sys

import pytest

files = [f"tests/unit/test_{name}.py" for name in ("lab", "answers", "published", "imports")]
failed = pytest.main(["-p", "no:cacheprovider", "-rA", *files, "-k", "abacus"])
print("collected:")
sys.exit(failed or pytest.main(["-p", "no:cacheprovider", "--collect-only", *sys.argv[1:]]))
"""


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A copy of what labs are made of, without results."""
    for name in HOUSE:
        if (ROOT / name).is_dir():
            built = shutil.ignore_patterns("node_modules")
            shutil.copytree(ROOT / name, tmp_path / name, ignore=built)
        else:
            shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def add(house: Path, lab: str) -> None:
    """One file, and one line."""
    (house / "labs" / "abacus_beads.py").write_text(lab)
    listing = house / "labs" / "__init__.py"
    assert listing.read_text().count(LAST) == 1
    listing.write_text(listing.read_text().replace(LAST, LAST + LINE))


def said(house: Path, *argv: str) -> str:
    environment = {
        **os.environ, "PYTHONPATH": str(house), "LABS_RESULTS": str(house / "results")
    }  # fmt: skip
    done = subprocess.run(argv, cwd=house, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_lab_is_one_file_and_one_line(house: Path) -> None:
    add(house, PLAIN)
    told = said(house, sys.executable, "-c", TELLS, str(house / "results"))
    assert "# Abacus beads on Abacus" in told
    assert "(SO-4) This run lacks the figures that would answer it." in told
    assert "| On is faster (Output throughput: on, 1 user / off, 1 user) | 2.9" in told
    assert "drawn: effects.svg variants.svg" in told
    link = "[`abacus-beads`](labs/abacus_beads.py)"
    assert f"| {link} | Does a cached prefix spare counting? |" in told
    assert "make lab-abacus-beads" in said(house, "make", "help")


def test_what_it_tells_beyond_that_is_one_more_file_and_the_tests_take_it(house: Path) -> None:
    add(house, TELLING)
    (house / "labs" / "findings" / "abacus_beads.py").write_text(PARTS)
    told = said(house, sys.executable, "-c", TELLS, str(house / "results"))
    assert "(SO-4) With 4 beads: 2.9" in told
    assert "## How many beads?\n\n- There are 4." in told
    assert "drawn: effects.svg rods.svg variants.svg" in told
    assert "- On is faster: 9x (Al-Khwarizmi, 820)" in told
    passed, collected = said(house, sys.executable, "-c", TESTS, *TIERS).split("collected:\n")
    for test in (
        "test_lab.py::test_every_claim_has_a_pair_and_a_prediction[abacus-beads-gpu-80-dummy]",
        "test_lab.py::test_what_to_turn_next_can_be_turned[abacus-beads]",
        "test_answers.py::test_every_question_of_a_lab_has_an_answer_and_no_other[abacus-beads]",
        "test_published.py::test_each_entry_is_about_a_part_of_a_lab[abacus-beads]",
        "test_imports.py::test_rooms_import_those_below_them[labs/findings/abacus_beads.py]",
    ):
        assert f"PASSED tests/unit/{test}" in passed
    for tier in TIERS:
        assert re.search(rf"^{re.escape(tier)}.*\[abacus-beads\]", collected, re.M), collected
