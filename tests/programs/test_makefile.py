"""Settings on their way from make's command line to the program, with make as it is installed."""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from labs.harness.cli.cli import app
from labs.harness.cli.settings import settings
from serving.models.catalog import ROOT
from tests.makefile import MAKEFILE, PAGES, SETTINGS

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="no make")
RECORD = """\
import os, sys
with open("calls", "a") as calls:
    print(ascii([[NAME, *sys.argv[1:]], dict(os.environ)]), file=calls)
"""
QUICK_PYTHON = f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -S "$@"\n'
"""Python without what is installed, which the programs here do not need; it starts much faster."""
LABS = ".venv/bin/labs"
NOT_READ_THERE = [ROOT / "tests" / name for name in ("unit", "programs")]
COMMANDS = get_command(app).commands  # type: ignore[attr-defined]
HOSTILE = (
    "$(shell touch made-by-make) `touch made-by-a-shell` \"; touch made-by-a-shell; ' $HOME # %"
)


class Checkout:
    """The Makefile beside programs that write down how they were called."""

    def __init__(self, home: Path) -> None:
        self.home = home
        commands = ("labs/harness/cli/settings.py", "labs/harness/cli/removed.txt")
        for file in ("Makefile", "docs/knobs.md", *commands):
            (home / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, home / file)
        for program in (
            ".venv/bin/labs",
            ".venv/bin/pytest",
            ".venv/bin/python",
            ".tools/vllm-0.31.0/.venv/bin/labs",
        ):
            self._program(home / program, f"#!{sys.executable} -S\n", program)
        for module in ("packaging/install", "unbundle"):
            self._program(home / "serving" / f"{module}.py", "", Path(module).name)
        python = home / "path" / "python3"
        python.parent.mkdir()
        python.write_text(QUICK_PYTHON)
        python.chmod(0o755)

    def _program(self, path: Path, first_line: str, name: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(first_line + RECORD.replace("NAME", repr(name)))
        path.chmod(0o755)

    def make(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        clean = {
            name: value
            for name, value in os.environ.items()
            if name not in (*SETTINGS, "PYTHONPATH") and not name.startswith("LABS_")
        }
        clean["PATH"] = f"{self.home / 'path'}:{clean['PATH']}"
        return subprocess.run(
            ["make", *words], cwd=self.home, env=clean | environment, capture_output=True, text=True
        )

    def calls(self) -> list[tuple[list[str], dict[str, str]]]:
        """(program and arguments, its environment), in order."""
        path = self.home / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        return [(argv, env) for argv, env in map(ast.literal_eval, lines)]


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def settings_of(env: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in env.items() if name.startswith("LABS_")}


def test_every_setting_that_is_read_is_one_that_make_hands_on() -> None:
    houses = ("labs", "serving", "loadtests", "dashboards", "bench", "tests")
    files = (path for house in houses for path in (ROOT / house).rglob("*.py"))
    sources = [path for path in files if path.parent not in NOT_READ_THERE]
    sources.append(ROOT / "dashboards" / "preview" / "vite.config.js")
    read = {name for p in sources for name in re.findall(r"[\"'.]LABS_([A-Z_]+)\b", p.read_text())}
    in_recipes = set(re.findall(r"LABS_([A-Z_]+)", MAKEFILE.partition("DEFAULT_GOAL")[2]))
    in_recipes |= {"VLLM", "PYTHON"}
    of_options = {str(p.envvar)[5:] for c in COMMANDS.values() for p in c.params if p.envvar}
    assert sorted(SETTINGS) == sorted(read | in_recipes | of_options)


def test_settings_arrive_as_they_were_typed_and_nothing_in_them_runs(checkout: Checkout) -> None:
    goals = {"serve": "serve", "derive": "derive", "export": "export", "test": "", "lab-x": "run x"}
    for goal, command in goals.items():
        names = {row.name for row in settings() if row.fits(goal)} - {"PYTHON", "VLLM", "HELP"}
        given = {f"LABS_{name}": HOSTILE for name in names}
        done = checkout.make(goal, *(f"{name}={HOSTILE}" for name in names))
        assert (done.returncode, done.stderr) == (0, "")
        argv, environment = checkout.calls()[-1]
        assert settings_of(environment) == given
        assert not environment.keys() & set(SETTINGS)
        assert "SET=" not in environment.get("MAKEFLAGS", "")
        assert argv == ([LABS, *command.split()] if command else [".venv/bin/pytest"])
    assert not list(checkout.home.glob("made-by-*"))


@pytest.mark.parametrize(
    ("name", "set_up"), [("VLLM", [["install", "--vllm", HOSTILE]]), ("PYTHON", [])]
)
def test_what_names_a_program_runs_nothing_else(
    name: str, set_up: list[list[str]], checkout: Checkout
) -> None:
    assert checkout.make("serve", f"{name}={HOSTILE}").returncode != 0  # there is none of that name
    assert [argv for argv, _ in checkout.calls()] == set_up
    assert not list(checkout.home.glob("made-by-*"))


def test_a_plain_name_in_the_environment_changes_nothing_and_is_named(checkout: Checkout) -> None:
    done = checkout.make("serve", PORT="1", A="$(shell touch made-by-make)", SEED="2")
    said = "A PORT SEED in the environment: not read. A setting goes behind the target,"
    assert said in done.stderr
    assert done.stderr.endswith("make serve A=.., and one for every call is called LABS_A\n")
    assert [settings_of(env) for _, env in checkout.calls()] == [{}, {}]
    assert not list(checkout.home.glob("made-by-*"))


def test_the_prefixed_name_holds_for_every_call_and_the_command_line_goes_before_it(
    checkout: Checkout,
) -> None:
    in_environment = {"LABS_SEED": "1", "LABS_PORT": "$(shell touch made-by-make)"}
    done = checkout.make("lab-x", "SEED=2", **in_environment)
    assert (done.returncode, done.stderr) == (0, "")
    *_, (_, environment) = checkout.calls()
    assert settings_of(environment) == in_environment | {"LABS_SEED": "2"}
    assert not list(checkout.home.glob("made-by-*"))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ("lab-x QIUCK=1", "there is no QIUCK=: did you mean QUICK=?"),
        ("lab-x ZZZZ=1", "there is no ZZZZ=: `make` lists the targets"),
        ("forcast LAB=x", "there is no make forcast: did you mean make forecast?"),
        ("zzzz", "there is no make zzzz: `make` lists"),
        ("lab-x PP=2", "PP= was removed: use `SET=flags.pipeline-parallel-size=2`"),
        ("watch-stop", "make watch-stop was removed: use `make stop`"),
        ("forecast LAB=x RATE=4", "RATE= would change nothing here: make forecast takes HELP="),
        ("report SET=x PRICE_PER_HOUR=2", "SET=, PRICE_PER_HOUR= would change nothing here"),
        ("stop QUICK=1", "QUICK= would change nothing here: make stop takes HELP="),
        ("labs-all AA=1", "AA= would change nothing here"),
        ("lab-x A'B`>made-by-make`=1", "there is no A'B"),
    ],
)
def test_what_is_not_there_is_refused_before_anything_runs_and_told_what_is(
    call: str, said: str, checkout: Checkout
) -> None:
    done = checkout.make(*call.split(" ", 2))
    assert done.returncode != 0
    assert said in done.stderr
    assert checkout.calls() == []
    assert not list(checkout.home.glob("made-by-*"))


def test_a_make_that_calls_this_one_may_have_variables_of_its_own(checkout: Checkout) -> None:
    (checkout.home / "outer.mk").write_text("all:\n\t@$(MAKE) --no-print-directory lab-x\n")
    done = checkout.make("-f", "outer.mk", "CC=clang", "SEED=2")
    assert (done.returncode, done.stderr) == (0, "")
    *_, (argv, environment) = checkout.calls()
    assert (argv, settings_of(environment)) == ([LABS, "run", "x"], {"LABS_SEED": "2"})


def test_secrets_keep_their_names(checkout: Checkout) -> None:
    secret = "$HOME$(shell touch made-by-make)"
    done = checkout.make("lab-x", f"GRAFANA_TOKEN={secret}", HF_TOKEN=secret)
    assert (done.returncode, done.stderr) == (0, "")
    *_, (_, environment) = checkout.calls()
    assert environment["GRAFANA_TOKEN"] == environment["HF_TOKEN"] == secret
    assert not list(checkout.home.glob("made-by-*"))


@pytest.mark.parametrize(
    ("target", "setting", "argv"),
    [
        ("lab-x", "HELP=", [LABS, "run", "x"]),
        ("derive", "NAME=", ["install"]),
        ("derive", "NAME=fp8", [LABS, "derive"]),
        ("compare", "A=", ["install"]),
        ("compare", "A=there", [LABS, "compare"]),
    ],
)
def test_a_command_without_what_it_needs_shows_what_it_takes(
    target: str, setting: str, argv: list[str], checkout: Checkout
) -> None:
    done = checkout.make(target, setting)
    assert done.returncode == 0
    assert checkout.calls()[-1][0] == argv
    assert (f"  {setting}" in done.stdout) == (argv == ["install"])


@pytest.mark.parametrize("goal", ["lab-x", "test", "compare", "check", "clean", "unbundle"])
def test_help_runs_nothing_and_has_the_settings_as_they_are_typed(
    goal: str, checkout: Checkout
) -> None:
    (checkout.home / ".cache").mkdir()
    done = checkout.make(goal, "HELP=1")
    assert (done.returncode, done.stderr) == (0, "")
    assert checkout.calls() == []
    assert (checkout.home / ".cache").exists()
    own = [row for row in settings() if row.fits(goal) and "all" not in row.targets]
    assert all(f"  {row.typed}\n" in done.stdout for row in own)
    assert done.stdout.count(f"make {goal}: ") == 1


@pytest.mark.parametrize(
    ("goal", "vllm", "set_up", "program"),
    [
        ("lab-x", "0.31.0", ["--vllm", "0.31.0"], ".tools/vllm-0.31.0/.venv/bin/labs"),
        ("bundle", "0.26.0", [], LABS),  # which vLLM the bundle is to carry
    ],
)
def test_another_vllm_has_an_environment_of_its_own(
    goal: str, vllm: str, set_up: list[str], program: str, checkout: Checkout
) -> None:
    for words, environment in (([f"VLLM={vllm}"], {}), ([], {"LABS_VLLM": vllm})):
        assert checkout.make(goal, *words, **environment).returncode == 0
        (install, _), (argv, found) = checkout.calls()[-2:]
        assert (install, argv[0]) == (["install", *set_up], program)
        assert found["LABS_VLLM"] == vllm


def test_tests_are_chosen_as_pytest_reads_its_options(checkout: Checkout) -> None:
    chosen = "tests/unit -k 'a or b'"
    assert checkout.make("test", f"TESTS={chosen}", PYTEST_ADDOPTS="-x").returncode == 0
    assert checkout.calls()[-1][1]["PYTEST_ADDOPTS"] == f"-x {chosen}"


# ------------------------------------------------------------------------------ what the pages say

CALLS = sorted(
    {
        call
        for page in PAGES
        for call in re.findall(r"(?:^|`)(make [^`\n]*?)(?:`|$)", page.read_text(), re.M)
        if "=" in call and ".." not in call
    }
)


@pytest.mark.parametrize("call", CALLS)
def test_a_call_on_a_page_hands_its_settings_on(call: str, checkout: Checkout) -> None:
    _, *words = shlex.split(call)
    targets = [word for word in words if "=" not in word]
    done = checkout.make(*(word.replace("<name>", "x") for word in words))
    assert (done.returncode, done.stderr) == (0, "")
    given = dict(word.split("=", 1) for word in words if word not in targets)
    _, environment = checkout.calls()[-1]
    assert settings_of(environment) == {f"LABS_{name}": value for name, value in given.items()}


@pytest.mark.parametrize(
    ("goal", "set_up"),
    [("site", ["--light"]), ("report", ["--light"]), ("serve", []), ("lab-x", [])],
)
def test_what_reads_runs_waits_for_no_vllm(
    goal: str, set_up: list[str], checkout: Checkout
) -> None:
    assert checkout.make(goal).returncode == 0
    assert checkout.calls()[-2][0] == ["install"]  # all is there
    light = checkout.home / ".tools" / "light"
    light.mkdir(parents=True)
    (checkout.home / ".venv").rename(light / ".venv")
    checkout.make(goal)
    install = next(argv for argv, _ in checkout.calls()[::-1] if argv[0] == "install")
    assert install == ["install", *set_up]
    assert (checkout.calls()[-1][0][0] == LABS) == bool(set_up)  # which is named as it was
