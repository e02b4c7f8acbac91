"""The wheel in an environment of its own, without vLLM, torch and transformers."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from labs.harness.runner.diagnosing import ReadingFile
from labs.harness.storage.results import RunFolder
from serving.metrics import together
from serving.packaging import install
from serving.places import PROGRAM
from tests.unit import hostile
from tests.unit.builders import write_run, write_slowed
from tests.unit.test_diagnosis import HEALTHY, MODELS, exposed

HEAVY = {"vllm", "torch", "transformers", "locust", "gevent", "huggingface_hub", "grafana_client"}
UNREACHABLE = re.compile(r"error sending request|dns error|not found in the cache|Network", re.I)


def uv(*words: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **install.uv_environment(PROGRAM)}
    command = [str(Path(sys.executable).with_name("uv")), *words]
    return subprocess.run(command, cwd=PROGRAM, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    done = uv(
        "build", "--wheel", "--no-build-isolation", "--python", sys.executable, "-o", str(folder)
    )
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    """The environment's folder. Skips where the index of packages cannot be reached."""
    venv = wheel.parent / "venv"
    assert uv("venv", "--python", sys.executable, str(venv)).returncode == 0
    done = uv("pip", "install", "--python", str(venv / "bin" / "python"), str(wheel))
    if done.returncode and UNREACHABLE.search(done.stderr):
        pytest.skip(f"the wheel's dependencies cannot be had here: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    return venv


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "of a user"


@pytest.fixture
def run(home: Path) -> RunFolder:
    """A run among the user's results, and one a day later that took twice as long."""
    folder = write_run(home / ".local" / "share" / "inference-serving-lab" / "results")
    write_slowed(folder, 2)
    return folder


def labs(venv: Path, home: Path, *words: str) -> tuple[int, str]:
    """Call the command as its user does; return its exit code, and what it said in one line."""
    kept = ("PATH", "LANG", "SSL_CERT_FILE")
    env = {name: os.environ[name] for name in kept if name in os.environ}
    done = subprocess.run(
        [venv / "bin" / "labs", *words],
        cwd=home, env={**env, "HOME": str(home), "COLUMNS": "200"}, capture_output=True, text=True,
    )  # fmt: skip
    return done.returncode, " ".join(f"{done.stdout} {done.stderr}".split())


def installed_files(venv: Path) -> set[Path]:
    (site,) = venv.glob("lib/python*/site-packages")
    return {path for path in site.rglob("*") if "__pycache__" not in path.parts}


def test_a_wheel_has_every_file_that_git_tracks_in_its_packages(wheel: Path) -> None:
    folders = ("labs", "serving", "loadtests", "dashboards")
    command = ["git", "-C", str(PROGRAM), "ls-files", "-z", "--", *folders]
    tracked = subprocess.run(command, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("this is no clone of a repository")
    with zipfile.ZipFile(wheel) as files:
        names = set(files.namelist())
    there = {name for name in tracked.stdout.split("\0") if name and (PROGRAM / name).exists()}
    assert there - names == set()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {*folders}


def test_recorded_runs_are_read_without_an_engine(
    installed: Path, home: Path, run: RunFolder
) -> None:
    before = installed_files(installed)
    again = str(run.path).replace("20260101", "20260102")
    code, text = labs(installed, home, "report")
    assert code == 0, text
    assert {"report.md", "report.html", "effects.svg"} <= {p.name for p in run.path.iterdir()}
    code, text = labs(installed, home, "site", "--out", "site")
    assert code == 0, text
    assert {"index.html", "forecasts.html", "planner.html"} <= {
        path.name for path in (home / "site").iterdir()
    }
    assert len([*(home / "site").glob("*/*/2026*.html")]) == 2
    code, text = labs(installed, home, "score", str(run.path))
    assert (code, "guidellm" in text.lower()) == (0, True), text
    code, text = labs(
        installed, home, "compare", "-a", str(run.path), "-b", again, "--out", "c.json"
    )
    assert code == 0, text
    assert json.loads((home / "c.json").read_text())
    code, text = labs(installed, home, "--results", "nowhere", "check")
    assert (code, text) == (0, "Well-formed runs: 0.")
    code, text = labs(installed, home, "--home", "elsewhere", "check")
    assert (code, text) == (0, "Well-formed runs: 0.")
    code, text = labs(installed, home, "check")
    assert (code, text) == (0, "Well-formed runs: 2.")
    assert installed_files(installed) == before


def test_memory_is_planned_without_an_engine_and_time_asks_for_one(
    installed: Path, wheel: Path, home: Path
) -> None:
    home.mkdir()
    before = installed_files(installed)
    heavy = f"import importlib.util as u; print([n for n in {HEAVY} if u.find_spec(n)])"
    python = installed / "bin" / "python"
    assert subprocess.check_output([python, "-c", heavy], text=True) == "[]\n"
    plan = ("plan", "--machine", "h100", "--model", "llama-70b")
    code, text = labs(installed, home, *plan)
    assert (code, "141.1 GB" in text) == (0, True), text
    requirement = f"inference-serving-lab[cuda] @ {wheel.as_uri()}"
    for words in (
        (*plan, "--precision", "fp8", "--rate", "1"),
        ("run", "continuous-batching"),
        ("forecast", "--lab", "continuous-batching", "--machine", "h100"),
    ):
        code, text = labs(installed, home, *words)
        assert code == 1, words
        assert f"error: vLLM is not installed here: run `pip install '{requirement}'`" in text
    assert "72.7 GB" in labs(installed, home, *plan, "--precision", "fp8")[1]
    assert installed_files(installed) == before
    assert not (home / "results").exists()


def test_a_running_server_is_diagnosed_without_an_engine(installed: Path, home: Path) -> None:
    home.mkdir()
    readings = [HEALTHY, together([HEALTHY, HEALTHY])]

    def show(send: hostile.Send) -> None:
        send(hostile.whole(exposed(readings.pop(0)), kind="text/plain"))

    with hostile.serving({"/v1/models": MODELS, "/metrics": show}) as url:
        code, text = labs(
            installed, home, "diagnose", "--endpoint", url, "--seconds", "1", "--out", "well.json"
        )
    assert code == 0, text
    kept = ReadingFile.model_validate_json((home / "well.json").read_text())
    assert kept.reading.requests == 10
