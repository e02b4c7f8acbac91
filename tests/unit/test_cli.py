"""The command line."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shlex
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import requests
from typer.main import get_command
from typer.testing import CliRunner

from dashboards import boards
from labs import LABS
from labs.harness.cli import all_labs, monitoring, recorded_runs, run_lab, settings
from labs.harness.cli.cli import app
from labs.harness.cli.terminal import reported_errors
from labs.harness.plan.resolve import RunRequest
from labs.harness.runner import backfill
from labs.harness.runner.resume import CannotResume
from labs.harness.site import leaderboards
from labs.harness.spec.lab import LabError, NotApplicable
from labs.harness.storage import results
from labs.harness.storage.results import RunFolder
from labs.harness.storage.writing import write_json
from serving.engines.vllm import Vllm
from serving.hardware.machine import detect
from serving.models import catalog
from serving.models.catalog import Model
from tests.cases import each
from tests.makefile import MAKEFILE
from tests.unit.builders import SHAPE, write_run, write_slowed

LAB = next(iter(LABS))
FORECAST = f"forecast --lab {LAB} --machine h100 --model llama-8b"


NOT_OPTIONS = {"DISTURBED", "HELP", "PROMETHEUS_DATA", "VERBOSE"}  # read by what a command calls

pytestmark = pytest.mark.usefixtures("signals_as_found")


def labs(*args: str) -> tuple[int, str]:
    """Exit code, and what is shown with its white space made single."""
    result = CliRunner().invoke(app, args)
    return result.exit_code, " ".join(result.output.split())


@each(
    ("command", "told"),
    [
        ("run no-lab", ["error: ", "'no-lab'", ", ".join(LABS)]),
        ("serve --lab no-lab", ["error: ", "'no-lab'", ", ".join(LABS)]),
        ("run prefix-cachin", ["'prefix-cachin'", "mean prefix-caching?", LAB]),
        (f"forecast --lab {LAB} --machine h1000", ["'h1000'", "mean h100?", "h200, a100, l4"]),
        (f"forecast --lab {LAB},paged-kw --machine h100", ["'paged-kw'", "paged-kv"]),
        (f"run {LAB} --set window_s", ["SET: 'window_s'", "field=value"]),
        (f"serve --lab {LAB} --set windw_s=3", ["'windw_s'", "mean window_s?", "name, "]),
        (f"serve --lab {LAB} --set window_s=0", ["greater than 0", "given 0"]),
        (
            f"serve --lab {LAB} --variant best",
            ["'best'", ", ".join(v.name for v in LABS[LAB].at("cpu", quick=False).variants)],
        ),
        ("serve --lab serving-engines --variant llama-cpp", ["llama.cpp", "vLLM alone"]),
        (f"run {LAB} --engine-command 'no-such-program serve'", ["program no-such-program"]),
        (f"run {LAB} --engine-command 'OPENAI_KEY=abc vllm'", ["program OPENAI_KEY=***"]),
        (f'run {LAB} --engine-command "nsys \'x"', ["ENGINE_COMMAND=nsys 'x: No closing"]),
        (f'run {LAB} --engine-command "vllm --api-key abc \'x"', ["vllm --api-key *** 'x"]),
        (f"{FORECAST} --slo fast", ["SLO=fast", "TTFT/TPOT"]),
        (f"{FORECAST} --slo 1e9/50", ["SLO=1e9/50"]),
        (f"{FORECAST} --slo 9999999999/50", ["at most 604800000 ms"]),
        (f"{FORECAST} --trace nowhere.csv", ["nowhere.csv", "read"]),
        (f"{FORECAST} --tp 3", ["TP=3", "32 heads", "8 KV heads"]),
        (f"{FORECAST} --tp 16", ["TP=16", "8 GPUs"]),
    ],
)
def test_what_cannot_be_done_is_refused_by_its_name_and_told_what_can(
    command: str, told: list[str]
) -> None:
    code, said = labs(*shlex.split(command))
    assert code == 1
    assert [words for words in told if words not in said] == [], said


def test_a_misspelled_setting_in_the_environment_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LABS_QIUCK", "1")
    monkeypatch.setenv("LABS_ZZZQ", "1")
    code, said = labs("list")
    assert code == 0
    assert re.search(r"LABS_QIUCK [^.]* LABS_QUICK\?", said)
    assert re.search(r"LABS_ZZZQ [^.]* docs.knobs", said)


@pytest.fixture
def own_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(all_labs, "FOLDER", tmp_path)
    monkeypatch.setattr(all_labs, "check_flags", lambda *_: None)  # imports vLLM


@pytest.mark.usefixtures("own_record")
@pytest.mark.parametrize(("refusal", "code"), [(NotApplicable, 0), (LabError, 1)])
def test_a_lab_that_does_not_apply_is_skipped_and_fails_nothing(
    refusal: type[LabError], code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise refusal("needs real weights")

    monkeypatch.setattr("labs.harness.cli.run_lab.run_lab", refuse)
    found, said = labs("all", "--weights", "dummy")
    assert found == code
    assert (f"Skipped: {LAB}" in said) == (refusal is NotApplicable)
    assert (f"Not finished: {LAB}" in said) == (refusal is LabError)
    if refusal is LabError:  # of the first lab, and of all at the end
        assert said.count("needs real weights") == 2


@pytest.mark.usefixtures("own_record")
def test_a_lab_that_cannot_be_continued_is_begun_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def refuse_once(request: RunRequest, *_: object) -> None:
        asked.append(request.resume)
        raise CannotResume("the model is another") if request.resume else LabError("no disk")

    monkeypatch.setattr("labs.harness.cli.run_lab.run_lab", refuse_once)
    labs("all", "--only", LAB)
    _, said = labs("all", "--only", LAB)  # which was begun
    assert asked == [False, True, False]
    assert "the model is another" in said


def test_serve_starts_the_engine_of_a_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    started = list[tuple[str, list[str], dict[str, str]]]()
    model = Model("lab/base-1B", Path("/models/base"), SHAPE)
    monkeypatch.setattr(catalog, "as_served", lambda model, value_bytes: model)
    monkeypatch.setattr("os.execve", lambda *of: started.append(of))
    monkeypatch.setattr("labs.harness.plan.resolve.model_of", lambda *_: model)
    monkeypatch.setattr("labs.harness.cli.cli.require_port", lambda *_: None)
    monkeypatch.setattr(Vllm, "check_flags", lambda *_: None)  # imports vLLM
    code, said = labs("serve", "--lab", "prefix-caching", "--variant", "off", "--port", "8123")
    assert code == 0, said
    ((program, argv, env),) = started
    assert program == argv[0]
    assert argv[argv.index("--port") + 1] == "8123"
    assert argv[argv.index("--host") + 1] == "127.0.0.1"
    assert {"/models/base", "--no-enable-prefix-caching"} <= {*argv}
    lab = LABS["prefix-caching"].at(catalog.scale_of(detect()), False)
    assert env.items() >= Vllm.environment(detect().kind, model, lab.all_flags).items()
    assert env["PATH"] == os.environ["PATH"]


def test_serve_serves_the_weights_of_the_variant_and_no_other_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, made = list[list[str]](), list[str]()

    def make(model: Model, name: str, _: object, made_here: bool) -> Path:
        assert not made_here  # what is published is served
        made.append(name)
        return tmp_path / name

    model = Model("lab/base-1B", Path("/models/base"), SHAPE)
    monkeypatch.setattr(catalog, "as_served", lambda model, value_bytes: model)
    monkeypatch.setattr("os.execve", lambda program, argv, env: started.append(argv))
    monkeypatch.setattr("labs.harness.cli.cli.model_of", lambda *_: model)
    monkeypatch.setattr("labs.harness.cli.cli.require_port", lambda *_: None)
    monkeypatch.setattr("labs.harness.cli.cli.derived_models.make", make)
    monkeypatch.setattr(
        "labs.harness.cli.cli.derived_models.with_weights",
        lambda of, name, folder: replace(of, path=folder),
    )
    monkeypatch.setattr(Vllm, "check_flags", lambda *_: None)  # imports vLLM
    for lab, variant in (("weight-quantization", "w8a8"), ("speculative-decoding", "draft-2")):
        code, said = labs("serve", "--lab", lab, "--variant", variant)
        assert code == 0, said
    assert made == ["w8a8", "draft"]
    assert str(tmp_path / "w8a8") in started[0]
    assert str(tmp_path / "draft") in " ".join(started[1])
    assert "<draft>" not in " ".join(started[1])


def test_commands_are_those_the_makefile_calls() -> None:
    """And they take what the page of settings says of their targets."""
    called = r"(?:\$\(LABS\) |\$\(call with,.*,)([a-z-]+)"
    recipes = re.findall(rf"^([a-z%-]+):.*(?:\n\t.*)*?\n\t.*?{called}", MAKEFILE, re.M)
    commands = get_command(app).commands  # type: ignore[attr-defined]
    assert set(commands) == {command for _, command in recipes}
    for target, command in recipes:
        takes = {str(p.envvar).removeprefix("LABS_") for p in commands[command].params if p.envvar}
        row = settings.ONE_LAB if target == "lab-%" else target
        on_page = {s.name for s in settings.settings() if row in s.targets}
        assert on_page - NOT_OPTIONS == takes - {"VLLM"}, target


def test_check_passes_whole_runs_and_names_what_is_wrong_with_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    folder = write_run(tmp_path)
    code, said = labs("check")
    assert (code, "Well-formed" in said) == (0, True)
    (folder.path / "COMPLETE").unlink()
    code, said = labs("check", str(folder.path))
    assert (code, "no COMPLETE" in said) == (1, True)
    code, said = labs("check", str(tmp_path))
    assert (code, "run.json" in said) == (1, True)


def test_report_is_written_anew_from_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    folder = write_run(tmp_path)
    (folder.path / "summary.json").unlink()
    code, said = labs("report")
    assert code == 0, said
    assert (folder.path / "report.md").exists()
    assert (folder.path / "report.html").exists()


def test_all_that_is_on_file_is_computed_anew_by_one_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    page = tmp_path / "page.md"
    monkeypatch.setattr(leaderboards, "write", lambda: [page])
    monkeypatch.setattr(boards, "write", lambda *_: [])
    told = write_run(tmp_path)
    older = write_slowed(told, 1.25)
    (told.path / "report.md").write_text("stale")
    for folder in (told, older):
        (folder.path / "summary.json").unlink()
    code, said = labs("report", "--committed")
    assert (code, page.name in said) == (0, True), said
    assert told.summary().judgements
    assert older.summary().judgements
    assert (told.path / "report.md").read_text() != "stale"
    assert not (older.path / "report.md").exists()
    code, said = labs("report", "--committed", str(told.path))
    assert (code, "RUN" in said) == (1, True)


def test_a_report_leaves_what_git_tracks_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that it tracks is told in a copy when it is named; a reader's own run in its place."""
    if shutil.which("git") is None:
        pytest.skip("no git")
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(recorded_runs, "ROOT", tmp_path)
    published = write_run(tmp_path / "results")
    stale = published.summary().model_copy(update={"judgements": []})
    write_json(published.path / "summary.json", stale)
    for words in (["init", "-q"], ["add", "."]):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    own = write_slowed(published, 1.25)
    code, said = labs("report")
    assert (code, "git tracks it: 1 run." in said) == (0, True), said
    assert own.is_packed
    code, said = labs("report", str(published.path))
    copy = RunFolder(tmp_path / "exports" / published.place)
    assert (code, f"{copy.path.name}/report.md" in said) == (0, True), said
    assert copy.summary().judgements
    assert published.summary() == stale
    changed = ["git", "-C", str(tmp_path), "diff", "--name-only"]
    assert subprocess.check_output(changed, text=True) == ""
    assert not published.is_packed


# ----------------------------------------------------------------------------- runs side by side


@pytest.fixture
def two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """A run, and a copy that took a quarter longer."""
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    first = write_run(tmp_path)
    return str(first.path), str(write_slowed(first, 1.25).path)


def test_what_is_worse_is_listed_and_ends_with_1(two: tuple[str, str], tmp_path: Path) -> None:
    """As does what was not compared, of machines."""
    run, slower = two
    code, said = labs("compare", "-a", run, "-b", slower, "--fail-if", "worse")
    assert code == 1
    assert re.search(r"FAILED tiny: Output throughput at on/short/concurrent-1: .*25%.* 10%", said)
    assert labs("compare", "-a", slower, "-b", run, "--fail-if", "worse")[0] == 0
    for more, why in (("--fail-if=worst", "mean worse?"), ("--thresholds=x", "without FAIL_IF=")):
        code, said = labs("compare", "-a", run, "-b", run, more)
        assert (code, why in said) == (1, True)
    here, there = Path(run).parents[1], tmp_path / "there"
    shutil.copytree(here, there)
    write_run(tmp_path, name="more")
    code, said = labs("compare", "-a", str(here), "-b", str(there), "--fail-if", "worse")
    assert (code, "FAILED more: " in said, "Likeliest" in said) == (1, True, False)


def test_comparison_is_shown_written_and_printed_as_json(
    two: tuple[str, str], tmp_path: Path
) -> None:
    a, b = two
    page = tmp_path / "page.md"
    code, said = labs("compare", "-a", a, "-b", b, "--out", str(page))
    assert (code, "Output throughput" in said) == (0, True)
    assert "0.80x" in page.read_text()
    code, _ = labs("compare", "-a", a, "-b", b, "--out", str(page.with_suffix(".json")))
    (found,) = json.loads(page.with_suffix(".json").read_text())["comparisons"]
    assert (code, found["lab"], found["paired"]) == (0, "tiny", True)
    code, said = labs("compare", "-a", a, "-b", f"{b}:on")
    assert (code, "on both sides" in said) == (1, True)


@pytest.mark.parametrize("command", [("score",), ("report",), ("export", "--run")])
@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("run.json", b"{", "run.json: Invalid JSON"),
        ("run.json", b"\xff", "run.json: not text"),
        (
            "trials/on/short/concurrent-1/1/requests.jsonl.gz",
            b"no gzip",
            "damaged (Not a gzipped file",
        ),
    ],
)
def test_a_damaged_run_is_one_sentence(
    two: tuple[str, str], command: tuple[str, ...], name: str, content: bytes, says: str
) -> None:
    (Path(two[0]) / name).write_bytes(content)
    code, said = labs(*command, two[0])
    assert (code, said.startswith("error:")) == (1, True)
    assert says in said


def test_export_says_what_it_wrote(two: tuple[str, str], tmp_path: Path) -> None:
    code, said = labs("export", "--run", two[0], "--out", str(tmp_path / "out"))
    assert (code, "requests.csv, measurements.csv" in said) == (0, True)
    assert (tmp_path / "out" / "requests.csv").exists()


def test_one_run_several_or_all_are_imported(
    two: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr(monitoring, "run_lock", contextlib.nullcontext)
    monkeypatch.setattr(monitoring, "all_runs", lambda: [])
    monkeypatch.setattr(
        backfill, "load", lambda folders, _: asked.append([str(f.path) for f in folders])
    )
    for run in (two[0], " ".join(two), ""):
        monkeypatch.setenv("LABS_RUN", run)
        assert labs("import")[0] == 0
    assert asked == [[two[0]], [*two], []]


def test_a_run_whose_disk_is_full_says_that_what_is_finished_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "source", None, "records")

    monkeypatch.setattr(run_lab, "run_lab", full)
    code, said = labs("run", LAB)
    assert code == 1
    assert "RESUME=1" in said
    assert "error: No space left on device (records)" in said


def test_a_file_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "site").touch()
    code, said = labs("site", "--out", str(tmp_path / "site" / "deeper"))
    assert (code, said.count("\n")) == (1, 0)
    assert f"({tmp_path / 'site' / 'deeper'})" in said


def test_an_export_that_cannot_be_written_is_not_said_of_the_run(
    two: tuple[str, str], tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "requests.csv")
    code, said = labs("export", "--run", two[0], "--out", str(tmp_path))
    assert (code, "requests.csv" in said, "cannot be read" in said) == (1, True, False)


@pytest.mark.parametrize("spared", ["", "example.org"])
def test_loopback_is_asked_directly_where_there_is_a_proxy(
    monkeypatch: pytest.MonkeyPatch, spared: str
) -> None:
    monkeypatch.setenv("http_proxy", "http://proxy.example:1")
    monkeypatch.setenv("NO_PROXY", spared)
    monkeypatch.setenv("no_proxy", "")  # as it is afterwards
    assert requests.utils.get_environ_proxies("http://127.0.0.1:9090/")
    with reported_errors():
        assert not requests.utils.get_environ_proxies("http://127.0.0.1:9090/")
        assert bool(requests.utils.get_environ_proxies("http://example.org/")) is not bool(spared)
