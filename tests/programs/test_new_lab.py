"""A lab is one folder and one line, an engine one file and one line: so they are added here.

Nothing else is touched, and the command line's checks, the reports, the README's course, the
Makefile's help and the tests take them. What a lab computes beyond its claims is one more file of
its folder.
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
HOUSE = (
    *("docs", "labs", "serving", "loadtests", "dashboards", "tests"),
    *("Makefile", "pyproject.toml", "README.md"),
)
LEFT_OUT = ("golden", "committed", "*.test.js", "locks")
"""What no part of the check reads."""
LAST_LAB, LAST_ENGINE = '        _lab("quantization_tools"),\n', '        _engine("llama_cpp"),\n'
LAB = '''
"""NAME: what is asked of it."""

from labs.harness.spec.lab import SLO, Arm, Claim, Evidence, Lab, Point, Prediction, Variant
from loadtests.arrivals import Concurrent
from loadtests.workload import Fixed, Workload
from serving import metrics

OFF = Variant(name="off", flags={"enable-prefix-caching": False})


def twice(treatment: Point, baseline: Point) -> Prediction:
    return Prediction(value=2.0, formula="by hand")


LAB = Lab(
    name="NAME",
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
    probes=PROBES,
    slo=SLO(ttft_s=1, tpot_s=0.1),
    requests=8,
    warmup_s=1,
    window_s=4,
)
'''
PAGE = """# TITLE

Does a cached prefix spare counting?

## How it works

Whoever has counted the beads of a row once need not count them again. So a prompt that begins like
an earlier one is counted from where it differs.

## Answers

### SO-4

ANSWER

## Claims

- `faster`: On is faster

## What a machine can and cannot show

### On a CPU

Beads of wood.

### On a GPU

Beads of glass.

## What to turn next

- SET=window_s=8 counts longer
"""
SIZES = '[cpu]\n"flags.enforce-eager" = true\n'
FINDING = """
## Findings

### beads: How many beads?

There are {{ beads.counted }}.

## Plots

### rods

The rods.
"""
FACTS = '''
"""What the beads tell."""

from dataclasses import dataclass

from labs.harness.derived.run_view import JudgedRun


@dataclass(frozen=True)
class Beads:
    counted: int


@dataclass(frozen=True)
class Facts:
    beads: Beads


def facts(run: JudgedRun) -> Facts:
    return Facts(Beads(counted=len(run.points)))
'''
PLOTS = '''
"""Draws the rods."""

from labs.abacus_rods.facts import Facts
from labs.harness.derived.run_view import JudgedRun
from labs.harness.reports.drawing import plt


def rods(run: JudgedRun, facts: Facts) -> bool:
    plt.plot([1, 2], [1, 2])
    return True


PLOTS = {"rods": rods}
'''
PROBES = '''
"""Asks how many beads there are."""

from typing import Any

from labs.harness.analysis.probes import Probe, ProbedEngine


def count(served: ProbedEngine) -> dict[str, Any]:
    return {"beads": 10}


PROBES = {"count": Probe(count, reads_text=False)}
'''
PUBLISHED = """
[[claims.faster]]
figure = "9x"
source = "Al-Khwarizmi, 820"
"""
ENGINE = '''
"""The abacus: it counts what it has answered, and nothing else."""

import sys
from collections.abc import Mapping
from typing import ClassVar

from serving import metrics
from serving.engines.base import Engine, Flags
from serving.models.catalog import Model


class Abacus(Engine):
    """A server of beads."""

    title = "Abacus"
    command = (sys.executable, "-m", "abacus")
    metric_names: ClassVar[Mapping[str, str]] = {"abacus:answers_total": metrics.REQUESTS}

    @classmethod
    def server_argv(cls, model: Model, flags: Flags, port: int) -> list[str]:
        return [str(port), *cls.flag_argv(flags)]


ENGINE = Abacus
'''
CHECK = """
import sys
from pathlib import Path

import pytest

from dashboards import prometheus
from labs import LABS
from labs.harness.site.leaderboards import generated_parts
from labs.harness.storage.results import RESULTS
from labs.harness.spec.lab import Variant
from labs.harness.plan.resolve import check_flags, require_harmless, require_known_names
from labs.harness.reports import report
from serving.engines import ENGINES
from tests.unit.builders import make_lab, write_run

for name in ("abacus-beads", "abacus-rods"):
    lab = LABS[name]
    require_known_names(lab.at("cpu", quick=True))
    folder = write_run(RESULTS, **dict(lab))
    print(report.write(folder).read_text())
    print("drawn:", *sorted(path.name for path in folder.path.glob("*.svg")))
    print("next:")
print(generated_parts(Path("README.md").read_text(), []))
print("next:")

counting = Variant(name="counting", engine="abacus")
lab = make_lab(variants=(counting,), claims=(), evidence=())
check_flags(lab)
require_harmless(lab)
print(ENGINES[counting.engine].title, lab.flags_of(counting), prometheus.config())
print("next:", flush=True)

tests = ("lab", "lab_pages", "answers", "published", "imports", "models", "gpu_sizes")
files = [f"tests/unit/test_{name}.py" for name in tests]
options = ["-p", "no:cacheprovider", "--no-header"]
chosen = "abacus or test_imports_go_one_way or test_machinery_knows_no_lab"
failed = pytest.main([*options, "-rA", *files, "-k", chosen])
print("next:", flush=True)
sys.exit(failed or pytest.main([*options, "--collect-only", *sys.argv[1:]]))
"""
TIERS = ("tests/cpu/test_labs.py", "tests/fake/test_run.py", "tests/gpu/test_labs.py")


def folder(
    name: str, findings: str = "()", plots: str = '("variants",)', probes: str = "()"
) -> dict[str, str]:
    """The files of a lab of that name."""
    title = name.replace("-", " ").capitalize()
    answer = "Speed is {{ claim('lost') }}."
    if findings != "()":
        answer = "With {{ beads.counted }} beads: {{ claim('faster') }}."
    parts = {
        "NAME": name, "TITLE": title, "FINDINGS": findings, "PLOTS": plots, "PROBES": probes,
        "ANSWER": answer,
    }  # fmt: skip
    files = {"lab.py": LAB, "page.md": PAGE, "sizes.toml": SIZES}
    return {
        file: re.sub("|".join(parts), lambda found: parts[found[0]], text)
        for file, text in files.items()
    }


def add(home: Path, name: str, after: str) -> None:
    """The one line."""
    listing = home / "__init__.py"
    assert listing.read_text().count(after) == 1
    line = re.sub('".*"', f'"{name}"', after)
    listing.write_text(listing.read_text().replace(after, after + line))


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what labs are made of, without results, with what is added."""
    home = tmp_path_factory.mktemp("house")
    for name in HOUSE:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, home / name, ignore=shutil.ignore_patterns(*LEFT_OUT))
        else:
            shutil.copy(ROOT / name, home / name)
    rods = folder("abacus-rods", '("beads",)', '("variants", "rods")', '("count",)')
    rods |= {"facts.py": FACTS, "plots.py": PLOTS, "probes.py": PROBES}
    rods["published.toml"] = PUBLISHED
    rods["page.md"] += FINDING
    for name, files in (("abacus_beads", folder("abacus-beads")), ("abacus_rods", rods)):
        (home / "labs" / name).mkdir()
        for file, text in files.items():
            (home / "labs" / name / file).write_text(text)
        add(home / "labs", name, LAST_LAB)
    (home / "serving" / "engines" / "abacus.py").write_text(ENGINE)
    add(home / "serving" / "engines", "abacus", LAST_ENGINE)
    return home


def said(house: Path, *argv: str) -> str:
    environment = {
        **os.environ, "PYTHONPATH": str(house), "LABS_RESULTS": str(house / "runs")
    }  # fmt: skip
    done = subprocess.run(argv, cwd=house, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def told(house: Path) -> list[str]:
    """Of one process: the two labs' reports, the course, the engine, the tests, and the tiers."""
    return said(house, sys.executable, "-c", CHECK, *TIERS).split("next:\n")


def not_passed(tests: str, *names: str) -> list[str]:
    """Those of these unit tests that did not pass in the copy."""
    return [name for name in names if f"PASSED tests/unit/{name}" not in tests]


def test_a_lab_is_one_folder_and_one_line(house: Path, told: list[str]) -> None:
    report, _, course, _, tests, collected = told
    assert "# Abacus beads on Abacus" in report
    assert "(SO-4)" in report
    assert "| 2.9" in report
    assert "drawn: effects.svg variants.svg" in report
    link = "[`abacus-beads`](labs/abacus_beads)"
    assert f"| {link} |" in course
    missing = not_passed(
        tests,
        "test_lab.py::test_every_claim_has_a_pair_and_a_prediction[abacus-beads]",
        "test_lab.py::test_what_to_turn_next_can_be_turned[abacus-beads]",
        "test_lab.py::test_a_quick_run_on_a_gpu_has_repeats_enough_for_an_interval[abacus-beads]",
        "test_lab_pages.py::test_every_part_of_a_lab_has_its_words[abacus-beads]",
        "test_imports.py::test_a_lab_file_speaks_the_lab_vocabulary_only[abacus-beads]",
        "test_gpu_sizes.py::test_an_objective_on_a_gpu_is_no_cpus_and_can_be_met[abacus-beads]",
        "test_models.py::test_every_lab_fits_every_class_of_gpu[abacus-beads]",
    )
    assert not missing, tests
    for tier in TIERS:
        assert re.search(rf"^{re.escape(tier)}.*\[abacus-beads\]", collected, re.M), collected


def test_what_it_tells_beyond_that_is_one_more_file(told: list[str]) -> None:
    _, report, _, _, tests, _ = told
    assert "With 4 beads: 2.9" in report
    assert "There are 4." in report
    assert "drawn: effects.svg rods.svg variants.svg" in report
    assert "9x" in report
    missing = not_passed(
        tests,
        "test_lab_pages.py::test_every_part_of_a_lab_has_its_words[abacus-rods]",
        "test_lab.py::test_names_in_a_lab_exist[abacus-rods]",
        "test_answers.py::test_findings_answers_and_plots_bear_what_is_left_out[abacus-rods]",
        "test_published.py::test_each_entry_is_about_a_part_of_a_lab[abacus-rods]",
        "test_imports.py::test_machinery_knows_no_lab",
    )
    assert not missing, tests


def test_an_engine_is_one_file_and_one_line(told: list[str]) -> None:
    _, _, _, engine, tests, _ = told
    assert engine.startswith("Abacus {} ")
    assert "abacus:answers_total" in engine
    assert not_passed(tests, "test_imports.py::test_imports_go_one_way") == []
