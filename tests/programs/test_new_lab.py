"""A lab is one folder and one line, an engine one file and one line: so they are added here.

Nothing else is touched, and the command line's checks, the reports, the README's course, the
Makefile's help and the tests take them. What a lab tells beyond its claims is one more file of its
folder.
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
HOUSE = ("labs", "serving", "loadtests", "dashboards", "tests", "Makefile", "pyproject.toml",
         "README.md")  # fmt: skip
LEFT_OUT = ("node_modules", "golden", "weights", "committed", "*.test.js", "locks")
"""What no part of the check reads."""
LAST_LAB, LAST_ENGINE = '        _lab("quantization_tools"),\n', '        _engine("llama_cpp"),\n'
LAB = '''
"""NAME: does a cached prefix spare counting?

Whoever has counted the beads of a row once need not count them again. So a prompt that begins like
an earlier one is counted from where it differs.
"""

from labs.harness.spec import SLO, Arm, Claim, Evidence, Lab, Point, Prediction, Variant
from loadtests.arrivals import Concurrent
from loadtests.workload import Fixed, Workload
from serving import metrics

OFF = Variant(name="off", flags={"enable-prefix-caching": False})


def twice(treatment: Point, baseline: Point) -> Prediction:
    return Prediction(value=2.0, formula="by hand")


LAB = Lab(
    name="NAME",
    title="TITLE",
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
    scales={"cpu": {"flags.enforce-eager": True}},
    limits={"cpu": "Beads of wood.", "gpu": "Beads of glass."},
    next_knobs=("SET=window_s=8 counts longer",),
)
'''
PARTS = '''
"""What the beads tell."""

from dataclasses import dataclass

from labs.harness.filing.results import Finding
from labs.harness.facts.context import Context, JudgedRun
from labs.harness.facts.drawing import plt
from labs.harness.facts.parts import Conclusion, ReportParts
from labs.harness.facts.published import Published


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
ENGINE = '''
"""The abacus: it counts what it has answered, and nothing else."""

import sys
from collections.abc import Mapping
from typing import ClassVar

from serving import metrics
from serving.engines.base import Engine, Flags
from serving.models import Model


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
from labs.harness.comparing.leaderboards import generated_parts
from labs.harness.filing.results import RESULTS
from labs.harness.spec import Variant
from labs.harness.running.resolve import check_flags, require_harmless, require_known_names
from labs.harness.telling import report
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

tests = ("lab", "answers", "published", "imports", "lesson", "models", "gpu_sizes")
files = [f"tests/unit/test_{name}.py" for name in tests]
options = ["-p", "no:cacheprovider", "--no-header"]
chosen = "abacus or test_imports_go_one_way or test_rooms_import_those_below_them"
failed = pytest.main([*options, "-rA", *files, "-k", chosen])
print("next:", flush=True)
sys.exit(failed or pytest.main([*options, "--collect-only", *sys.argv[1:]]))
"""
TIERS = ("tests/cpu/test_labs.py", "tests/fake/test_run.py", "tests/gpu/test_labs.py")


def lab(name: str, findings: str = "()", plots: str = '("variants",)') -> str:
    """The file of a lab of that name."""
    title = name.replace("-", " ").capitalize()
    parts = {"NAME": name, "TITLE": title, "FINDINGS": findings, "PLOTS": plots}
    return re.sub("|".join(parts), lambda found: parts[found[0]], LAB)


def add(home: Path, file: str, text: str, after: str) -> None:
    """One file, or the first one of a folder, and one line."""
    module = home / file
    module.parent.mkdir(exist_ok=True)
    module.write_text(text)
    listing = home / "__init__.py"
    assert listing.read_text().count(after) == 1
    line = re.sub('".*"', f'"{Path(file).parts[0].removesuffix(".py")}"', after)
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
    add(home / "labs", "abacus_beads/lab.py", lab("abacus-beads"), LAST_LAB)
    rods = lab("abacus-rods", '("beads",)', '("variants", "rods")')
    add(home / "labs", "abacus_rods/lab.py", rods, LAST_LAB)
    (home / "labs" / "abacus_rods" / "facts.py").write_text(PARTS)
    add(home / "serving" / "engines", "abacus.py", ENGINE, LAST_ENGINE)
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
    assert "(SO-4) This run lacks valid figures that would answer it: see *Validity*." in report
    assert "| On is faster (Output throughput: on, 1 user / off, 1 user) | 2.9" in report
    assert "drawn: effects.svg variants.svg" in report
    link = "[`abacus-beads`](labs/abacus_beads)"
    assert f"| {link} | Does a cached prefix spare counting? |" in course
    assert "make lab-abacus-beads" in said(house, "make", "help")
    missing = not_passed(
        tests,
        "test_lab.py::test_every_claim_has_a_pair_and_a_prediction[abacus-beads]",
        "test_lab.py::test_what_to_turn_next_can_be_turned[abacus-beads]",
        "test_lab.py::test_a_quick_run_on_a_gpu_has_repeats_enough_for_an_interval[abacus-beads]",
        "test_answers.py::test_every_question_of_a_lab_has_an_answer_and_no_other[abacus-beads]",
        "test_lesson.py::test_every_lab_has_a_lesson_of_whole_sentences[abacus-beads]",
        "test_imports.py::test_a_lab_file_speaks_the_lab_vocabulary_only[abacus-beads]",
        "test_gpu_sizes.py::test_an_objective_on_a_gpu_is_no_cpus_and_can_be_met[abacus-beads]",
        "test_models.py::test_every_lab_fits_every_class_of_gpu[abacus-beads]",
    )
    assert not missing, tests
    for tier in TIERS:
        assert re.search(rf"^{re.escape(tier)}.*\[abacus-beads\]", collected, re.M), collected


def test_what_it_tells_beyond_that_is_one_more_file(told: list[str]) -> None:
    _, report, _, _, tests, _ = told
    assert "(SO-4) With 4 beads: 2.9" in report
    assert "## How many beads?\n\n- There are 4." in report
    assert "drawn: effects.svg rods.svg variants.svg" in report
    assert "- On is faster: 9x (Al-Khwarizmi, 820)" in report
    missing = not_passed(
        tests,
        "test_answers.py::test_every_question_of_a_lab_has_an_answer_and_no_other[abacus-rods]",
        "test_answers.py::test_findings_answers_and_plots_bear_what_is_left_out[abacus-rods]",
        "test_published.py::test_each_entry_is_about_a_part_of_a_lab[abacus-rods]",
        "test_imports.py::test_rooms_import_those_below_them",
    )
    assert not missing, tests


def test_an_engine_is_one_file_and_one_line(told: list[str]) -> None:
    _, _, _, engine, tests, _ = told
    assert engine.startswith("Abacus {} ")
    assert "abacus:answers_total" in engine
    assert not_passed(tests, "test_imports.py::test_imports_go_one_way") == []
