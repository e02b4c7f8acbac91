"""The program depends neither on HOME, nor on the working folder, nor on another clone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dashboards import prometheus
from labs.harness.cli import recorded_runs
from labs.harness.runner import run as running
from labs.harness.storage import results
from labs.harness.storage.results import RunFolder
from serving import places
from serving.models.catalog import ROOT
from serving.places import OWN_FOLDER, named_or
from tests.unit.builders import write_run

OPENED = """
import os, sys

opened = set()

def note(event, arguments):
    if event == "open" and isinstance(arguments[0], str):
        opened.add(os.path.realpath(arguments[0]))

sys.addaudithook(note)
from labs.harness.cli.__main__ import main

try:
    main()
finally:
    with open(os.environ["OPENED"], "w") as file:
        print(*sorted(opened), sep="\\n", file=file)
"""


def labs(house: Path, cwd: Path, *argv: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Call a Python of this environment on the program of a clone, without the tests' settings."""
    kept = {n: v for n, v in os.environ.items() if not n.startswith(("LABS_", "XDG_", "MPL"))}
    env = {**kept, "PYTHONPATH": str(house), **variables}
    return subprocess.run([sys.executable, *argv], cwd=cwd, env=env, capture_output=True, text=True)


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_report_is_the_same_under_any_home_and_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Matplotlib reads its settings from both; neither is written to."""
    here, there = (write_run(tmp_path / name / "results") for name in ("here", "there"))
    monkeypatch.setattr(results, "RESULTS", tmp_path / "here" / "results")
    recorded_runs._rebuild(here)
    home, cwd = tmp_path / "$HOME of 'Ünal' \"&\n#%", tmp_path / "elsewhere"
    for folder in (home / ".config" / "matplotlib", cwd):
        folder.mkdir(parents=True)
        (folder / "matplotlibrc").write_text("lines.linewidth: 30\n")
    before = files_of(home), files_of(cwd)
    done = labs(
        ROOT, cwd, "-m", "labs.harness.cli", "report", str(there.path),
        HOME=str(home), LABS_RESULTS=str(tmp_path / "there" / "results"),
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert (files_of(home), files_of(cwd)) == before
    assert files_of(there.path) == files_of(here.path)
    assert "effects.svg" in files_of(here.path)


def test_tests_of_programs_do_not_see_the_readers_own_results() -> None:
    for name in ("results", "site"):
        with pytest.raises(AssertionError, match=f"/{name}/"):
            os.listdir(ROOT / name)


def test_a_second_clone_reads_its_own_files(tmp_path: Path) -> None:
    """Its results and its settings, and no file of the first; nor does it miss a home folder."""
    house = tmp_path / "second clone"
    listing = ("--cached", "--others", "--exclude-standard", "--", ".", ":!results")
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z", *listing], capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("this is no clone of a repository")
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).exists():
            (house / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, house / name)
    makefile = house / "Makefile"
    page = house / "docs" / "knobs.md"
    page.parent.mkdir(exist_ok=True)
    rows = (ROOT / "docs" / "knobs.md").read_text()
    page.write_text(f"{rows}\n| `ABACUS=1` | Counts by hand. | all |\n")
    run: RunFolder = write_run(house / "results")
    home = makefile / "home"  # which even root cannot make
    done = labs(
        house, tmp_path, "-c", OPENED, "check",
        LABS_ABACUS="1", HOME=str(home), OPENED=str(tmp_path / "opened"),
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("Well-formed runs: 1.\n", "")
    opened = [Path(line) for line in (tmp_path / "opened").read_text().splitlines()]
    vocabulary = house / "labs" / "harness" / "spec" / "lab.py"
    assert {vocabulary, page, run.path / "run.json"} <= set(opened)
    installed = Path(sys.prefix).resolve()  # in the clone that its packages were installed for
    first = {clone for clone in (ROOT, installed.parent) if (clone / "labs").is_dir()}
    of_the_first = [p for p in opened if first & set(p.parents) and installed not in p.parents]
    assert of_the_first == []


def test_nothing_of_the_readers_is_erased_in_a_folder_that_they_name() -> None:
    """What a killed run left is, since it lies in a folder of our own name there."""
    named = Path(os.environ["LABS_SCRATCH"])
    theirs, ours = named / "run-001" / "weights", named / OWN_FOLDER / "run-killed"
    for folder in (theirs, ours):
        folder.mkdir(parents=True)
    (named / "run.lock").write_text("of another program")
    with running._scratch_locked() as work:
        assert work.parent == named / OWN_FOLDER
    assert theirs.exists()
    assert not ours.exists()
    assert (named / "run.lock").read_text() == "of another program"


def test_data_of_prometheus_lie_in_a_folder_of_our_own_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = Path(os.environ["LABS_PROMETHEUS_DATA"])
    assert (data / OWN_FOLDER).resolve() == prometheus.HOME
    monkeypatch.delenv("LABS_PROMETHEUS_DATA")
    assert named_or("LABS_PROMETHEUS_DATA", tmp_path) == tmp_path


@pytest.mark.parametrize(
    ("origin", "advised"),
    [
        ({"url": "file:///a/lab.whl", "archive_info": {}}, "[cuda] @ file:///a/lab.whl'"),
        (
            {"url": "https://git.example/lab", "vcs_info": {"vcs": "git", "commit_id": "ab1"}},
            "[cuda] @ git+https://git.example/lab@ab1'",
        ),
        (None, "run `make setup` in a clone"),
    ],
)
def test_no_index_is_asked_for_a_package_that_it_does_not_have(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    origin: dict[str, object] | None,
    advised: str,
) -> None:
    about = tmp_path / "inference_serving_lab-0.1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Name: {OWN_FOLDER}\nVersion: 0.1.0\n")
    if origin:
        (about / "direct_url.json").write_text(json.dumps(origin))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(places, "IN_CLONE", False)
    said = places.how_to_install("cuda")
    assert advised in said
    assert "[cuda]'" not in said  # a name alone
