"""Folders of results that somebody else wrote: they are data, and are checked before use."""

from __future__ import annotations

import gzip
import json
import math
import os
import re
import shutil
import subprocess
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt
from typer.testing import CliRunner

from labs import LABS
from labs.harness.cli.cli import app
from labs.harness.cli.terminal import ConsoleProgress
from labs.harness.plan.chat_writer import writer_of
from labs.harness.plan.resolve import RunRequest, require_harmless, resolve
from labs.harness.reports.markdown import FOLD_END
from labs.harness.runner import reproduce
from labs.harness.site import site
from labs.harness.spec.lab import Lab, LabError, digest_of
from labs.harness.storage import bounded, checks, engine_series, manifest
from labs.harness.storage.bounded import DamagedError
from labs.harness.storage.committed import tracked_names
from labs.harness.storage.recorded import Run, lab_from_resolved
from labs.harness.storage.results import RunFolder
from labs.harness.storage.writing import write_json
from serving.engines.base import EngineError
from serving.engines.vllm import Vllm
from serving.models import catalog
from serving.models.catalog import ModelError
from tests.cases import each
from tests.shards import write_shard
from tests.unit.builders import write_slowed

LAB = next(iter(LABS.values()))


def labs(*args: str) -> tuple[int, str]:
    """Exit code, and what is shown with its white space made single."""
    result = CliRunner().invoke(app, args)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, " ".join(result.output.split())


# --------------------------------------------------------------------------- flags and variables

UNKNOWN = "is not among the flags that are known to be harmless"
HOSTILE: list[tuple[dict[str, Any], str]] = [
    ({"tool-parser-plugin": "results/x/plugin.py"}, UNKNOWN),
    ({"worker-extension-cls": "os.system"}, UNKNOWN),
    ({"logits-processors": ["a.b"]}, UNKNOWN),
    ({"trust-remote-code": True}, UNKNOWN),
    ({"hf-overrides": {"auto_map": {}}}, "hf-overrides.auto_map has a value"),
    ({"attention-config": {"hisparse_config": {}}}, "attention-config.hisparse_config has a value"),
    ({"structured-outputs-config": {"backend": "../x"}}, "outputs-config.backend has a value"),
    ({"structured-outputs-config": {"reasoning_parser_plugin": "x.py"}}, "_plugin has a value"),
    ({"host": "0.0.0.0"}, UNKNOWN),
    ({"kv-transfer-config": {"kv_connector": "x"}}, UNKNOWN),
    ({"chat-template": "/etc/passwd"}, UNKNOWN),
    ({"config": "x.yaml"}, UNKNOWN),
    ({"max-num-seq": 8}, r"harmless \(did you mean max-num-seqs\?\)"),
    ({"speculative-config": {"model": "/tmp/draft"}}, "speculative-config.model has a value"),
    ({"compilation-config": {"backend": "a.b"}}, "compilation-config.backend has a value"),
    ({"lora-modules": ["a=/tmp/adapter"]}, "lora-modules has a value"),
    ({"lora-modules": ["a=<adapters>/../../x"]}, "lora-modules has a value"),
    ({"distributed-executor-backend": "my.Executor"}, "executor-backend has a value"),
    ({"kv-cache-dtype": "--trust-remote-code"}, "kv-cache-dtype has a value"),
    ({"max-num-seqs": "8"}, "max-num-seqs has a value"),
    ({"max-num-seqs": 10**6}, "max-num-seqs has a value"),
    ({"max-model-len": 10**8}, "max-model-len has a value"),
    ({"num-gpu-blocks-override": 10**12}, "num-gpu-blocks-override has a value"),
    ({"cudagraph-capture-sizes": [1] * 10**5}, "cudagraph-capture-sizes has a value"),
    ({"speculative-config": {"num_speculative_tokens": 10**9}}, "num_speculative_tokens has a"),
]


@pytest.mark.parametrize(("flags", "why"), HOSTILE)
def test_a_recorded_run_whose_flags_may_do_harm_is_not_repeated(
    flags: dict[str, Any], why: str
) -> None:
    hostile = LAB.at("cpu", quick=True)
    hostile = hostile.model_copy(update={"flags": {**hostile.flags, **flags}})
    with pytest.raises(EngineError, match=f"{why}.*a recorded run may come from anybody"):
        resolve(RunRequest(hostile, True, reproduces="x", model="none"), ConsoleProgress())


def test_it_is_refused_before_its_model_is_looked_for(folder: RunFolder) -> None:
    """A model may have gigabytes, and is fetched with the reader's token."""
    lab = LAB.at("cpu", quick=True)
    lab = lab.model_copy(update={"flags": {**lab.flags, "trust-remote-code": True}})
    update = {"lab": json.loads(json.dumps(lab.resolved())), "digest": lab.digest()}
    with pytest.raises(EngineError, match="a recorded run may come from anybody"):
        reproduce.request(folder.run().model_copy(update=update))


@pytest.mark.parametrize("name", ["x/../../y", "draft/../..", "../x", "8bit", "-x", ""])
def test_what_is_derived_for_it_is_a_name_and_no_path(name: str) -> None:
    plain = LAB.resolved()
    if name:
        with pytest.raises(ValueError, match="pattern"):
            lab_from_resolved({**plain, "variants": [{"name": "a", "weights": name}]}, LAB)
    with pytest.raises(ValueError, match="pattern"):
        lab_from_resolved({**plain, "studies": [name]}, LAB)


def test_git_starts_no_program_that_a_folder_names(tmp_path: Path) -> None:
    """Its own configuration may say what git starts to list its files."""
    started, repository = tmp_path / "started", tmp_path / "theirs"
    repository.mkdir()
    for words in (("init", "-q"), ("config", "core.fsmonitor", f"touch {started}; false")):
        subprocess.run(["git", "-C", str(repository), *words], check=True)
    (repository / "a.log").write_text("")
    subprocess.run(["git", "-C", str(repository), "add", "a.log"], check=True)
    assert started.exists()  # git itself starts it
    started.unlink()
    assert tracked_names(repository, "*.log") == ["a.log"]
    assert tracked_names(repository, "*.txt") == []
    assert not started.exists()


@pytest.mark.parametrize("name", LABS)
@each("scale", ["cpu", "gpu-24", "gpu-80"])
@each("random", [False, True])
def test_the_labs_own_flags_are_harmless(name: str, scale: str, random: bool) -> None:
    require_harmless(LABS[name].at(scale, False, dummy=random))


@pytest.mark.parametrize("command", [("run", LAB.name), ("forecast", "--lab", LAB.name)])
def test_a_flag_by_hand_is_refused_and_the_way_to_insist_is_named(command: tuple[str, ...]) -> None:
    code, said = labs(*command, "--set", "flags.trust-remote-code=true")
    assert code == 1
    assert "known to be harmless; if you know what" in said
    assert "UNSAFE_FLAGS=1 passes it on" in said
    code, said = labs(
        *command, "--set", "flags.trust-remote-code=true", "--unsafe-flags", "--model", "./none"
    )
    assert "MODEL=./none is not there" in said  # the check that comes after


def test_serve_refuses_it_too() -> None:
    code, said = labs("serve", "--lab", LAB.name, "--set", "flags.host=0.0.0.0")
    assert (code, "host is not among the flags" in said) == (1, True)


def test_what_the_lab_sets_itself_is_refused_even_where_the_reader_insists() -> None:
    for flag in ("host", "port", "api-key", "middleware", "served-model-name"):
        with pytest.raises(EngineError, match=f"the lab sets {flag} itself"):
            Vllm.check_flags([{flag: "x"}])


# ------------------------------------------------------------------------- paths in a manifest


def recorded(lab: Lab, like: Run, **update: Any) -> Run:
    plain = lab.resolved()
    return like.model_copy(update={"lab": plain, "digest": digest_of(plain), **update})


def test_a_trace_that_names_a_file_is_not_read(folder: RunFolder, tmp_path: Path) -> None:
    """A pipe: whoever opens it waits for ever."""
    os.mkfifo(tmp_path / "pipe")
    lab = folder.run().lab
    workload = lab["workloads"][0] | {"trace": str(tmp_path / "pipe")}
    with pytest.raises(DamagedError, match="a recorded trace is a list, and this one names a file"):
        lab_from_resolved(lab | {"workloads": [workload]})
    scales = {"cpu": {"workloads.short.trace": str(tmp_path / "pipe")}}
    assert lab_from_resolved(lab | {"scales": scales}).scales == {}
    for changes in (
        {f"workloads.{LAB.workloads[0].name}.trace": str(tmp_path / "pipe")},
        {"workloads": [{"trace": str(tmp_path / "pipe")}]},
    ):
        run = recorded(LAB.at("cpu", True), folder.run(), quick=True, changes=changes)
        manifest.is_stale(run)


@pytest.mark.parametrize("model", ["/tmp/model", "../model", "~/model", "a/b/c", "-x", "results"])
def test_a_model_that_its_author_put_into_a_folder_is_not_served(
    model: str, folder: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "results").mkdir()
    monkeypatch.chdir(tmp_path)
    run = recorded(LAB.at("cpu", True), folder.run(), quick=True, model=model)
    with pytest.raises(LabError, match=r"its author chose: say which one to serve with MODEL="):
        reproduce.request(run)
    assert reproduce.request(run, model="mine").model == "mine"


# --------------------------------------------------------------------------------- contradictions

TRIAL = "trials/on/short/concurrent-1/1"


def without_records(folder: RunFolder) -> None:
    for path in folder.path.rglob("requests.jsonl.gz"):
        path.unlink()


def without_trials(folder: RunFolder) -> None:
    for path in folder.path.rglob("trial.json"):
        path.unlink()


def with_a_failed_trial(folder: RunFolder) -> None:
    path = folder.path / TRIAL / "trial.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "failed": "it died"}))


def with_better_figures(folder: RunFolder) -> None:
    summary = folder.summary()
    summary.measurements["on/short/concurrent-1"][1]["output_tokens_per_s"] = 1e6
    write_json(folder.path / "summary.json", summary)


def with_another_verdict(folder: RunFolder) -> None:
    summary = folder.summary()
    first, *others = summary.judgements
    judgements = [first.model_copy(update={"outcome": "hurts"}), *others]
    write_json(folder.path / "summary.json", summary.model_copy(update={"judgements": judgements}))


def with_another_window(folder: RunFolder) -> None:
    run = folder.run()
    write_json(
        folder.path / "run.json", run.model_copy(update={"lab": run.lab | {"window_s": 8.0}})
    )


CONTRADICTIONS = [
    (without_records, "requests.jsonl.gz is missing"),
    (without_trials, "trial off/short/concurrent-1/1 is missing"),
    (with_a_failed_trial, "trial on/short/concurrent-1/1 failed, and yet it is COMPLETE"),
    (with_better_figures, "output_tokens_per_s of on/short/concurrent-1/1 is not what its records"),
    (with_another_verdict, "its summary's verdict on faster at "),
    (with_another_window, "its lab was changed after the run: the digest is another"),
]


@pytest.mark.parametrize(("spoil", "why"), CONTRADICTIONS)
def test_a_run_that_contradicts_itself_is_used_for_nothing(
    spoil: Any, why: str, folder: RunFolder
) -> None:
    other = write_slowed(folder, 1)
    whole, spoilt = str(folder.path), str(other.path)
    assert labs("check", whole)[0] == 0
    spoil(other)
    for command in (
        ("compare", "-a", spoilt, "-b", whole),
        ("compare", "-a", whole, "-b", spoilt),
        ("reproduce", "--run", spoilt),
        ("check", spoilt),
    ):
        code, said = labs(*command)
        assert (code, why in said) == (1, True), said


def test_a_figure_that_was_defined_since_is_no_contradiction(folder: RunFolder) -> None:
    summary = folder.summary()
    del summary.measurements["on/short/concurrent-1"][1]["output_tokens_per_s"]
    write_json(folder.path / "summary.json", summary)
    assert labs("check", str(folder.path))[0] == 0


# ------------------------------------------------------------------- sizes out of this world, links


def rewritten(folder: RunFolder, **lab: Any) -> None:
    """Give the run another lab, with the digest that belongs to it."""
    path = folder.path / "run.json"
    run = json.loads(path.read_text())
    run["lab"] |= lab
    run["digest"] = digest_of(run["lab"])
    path.write_text(json.dumps(run))


def record(folder: RunFolder, **fields: Any) -> None:
    path = folder.path / TRIAL / "requests.jsonl.gz"
    first, *others = gzip.decompress(path.read_bytes()).splitlines()
    changed = json.dumps(json.loads(first) | fields).encode()
    path.write_bytes(gzip.compress(b"\n".join([changed, *others]) + b"\n"))


def edit(folder: RunFolder, name: str, **fields: Any) -> None:
    path = folder.path / name
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def linked(folder: RunFolder, name: str) -> None:
    path = folder.path / name
    target = path.rename(folder.path.parents[2] / f"elsewhere-{folder.path.name}")
    path.symlink_to(target)


def piped(folder: RunFolder, name: str) -> None:
    (folder.path / name).unlink()
    os.mkfifo(folder.path / name)


def bomb(folder: RunFolder) -> None:
    (folder.path / TRIAL / "requests.jsonl.gz").write_bytes(gzip.compress(bytes(3 * 2**20)))


def named(folder: RunFolder, name: str) -> None:
    variants = folder.run().lab["variants"]
    rewritten(folder, variants=[{**variants[0], "name": name}, *variants[1:]])


def window(folder: RunFolder, **summary: Any) -> None:
    path = folder.path / TRIAL / "trial.json"
    trial = json.loads(path.read_text())
    path.write_text(json.dumps(trial | {"summary": trial["summary"] | summary}))


SHAPE = {"layers": 1, "hidden": 8}
IMPOSSIBLE: dict[str, tuple[Callable[[RunFolder], None], str]] = {
    "repeats": (lambda f: rewritten(f, repeats=10**9), "repeats"),
    "requests": (lambda f: rewritten(f, requests=10**9), "requests"),
    "all requests": (lambda f: rewritten(f, requests=10**6), "are the most"),
    "window": (lambda f: rewritten(f, window_s=1e308), "window_s"),
    "claims": (lambda f: rewritten(f, claims=[{"a": 1}]), "its lab"),
    "no variant": (lambda f: rewritten(f, variants=[["a"]]), "run.json"),
    "name": (lambda f: named(f, "../x"), "pattern"),
    "label": (lambda f: named(f, 'a"} 1'), "pattern"),
    "run id": (lambda f: edit(f, "run.json", run_id="../../x"), "run_id"),
    "shape": (lambda f: edit(f, "run.json", model_shape=SHAPE), "no shape of a model"),
    "date": (lambda f: edit(f, "run.json", started_at="noon"), "noon"),
    "deep": (lambda f: deepen(f), "recursion"),
    "late": (lambda f: record(f, chunks=[[1e308, 1]]), "a time is no number of seconds"),
    "early": (lambda f: record(f, sent_s=-1e308), "a time is no number of seconds"),
    "not a number": (lambda f: record(f, end_s=math.nan), "not a request record"),
    "text": (lambda f: record(f, sent_s="10"), "a time is no number of seconds"),
    "truth": (lambda f: record(f, chunks=[[11.0, True]]), "whole number"),
    "tokens": (lambda f: record(f, chunks=[[11.0, 10**9]]), "more than 10000000 tokens"),
    "bomb": (bomb, "unpacks to more than 2 MiB"),
    "start": (lambda f: window(f, started_unix_s=1e308), "started_unix_s"),
    "end": (lambda f: window(f, window_s=[0, math.inf]), "window_s"),
    "counts": (lambda f: edit(f, f"{TRIAL}/trial.json", engine={"values": {"a": {}}}), "engine"),
    "linked file": (lambda f: linked(f, f"{TRIAL}/requests.jsonl.gz"), "not a regular file"),
    "linked folder": (lambda f: linked(f, "trials/on"), "not a regular file"),
    "linked run": (lambda f: linked(f, "run.json"), "not a regular file"),
    "pipe": (lambda f: piped(f, "predictions.json"), "not a regular file"),
    "repository": (lambda f: (f.path / ".git").mkdir(), "a repository of its own"),
}


def deepen(folder: RunFolder) -> None:
    edit(folder, "run.json", about={"a": 1})
    path = folder.path / "run.json"
    path.write_text(path.read_text().replace('{"a": 1}', '{"a": ' * 10**5 + "1" + "}" * 10**5))


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded, "MOST_UNPACKED_BYTES", 2 * 2**20)


@pytest.mark.parametrize("fault", IMPOSSIBLE)
def test_what_no_run_has_is_one_sentence_wherever_it_is_read(
    fault: str, folder: RunFolder, tmp_path: Path
) -> None:
    spoil, why = IMPOSSIBLE[fault]
    other = write_slowed(folder, 1)
    whole, spoilt = str(folder.path), str(other.path)
    spoil(other)
    for command in (
        ("report", spoilt),
        ("check", spoilt),
        ("score", spoilt),
        ("export", "--run", spoilt, "--out", str(tmp_path / "out")),
        ("compare", "-a", whole, "-b", spoilt),
        ("reproduce", "--run", spoilt),
    ):
        code, said = labs(*command)
        assert (code, why in said) == (1, True), (command, said)


def spoilt_in_every_way(folder: RunFolder) -> dict[str, str]:
    """Put a copy of a run with each fault beside it; returns what is wrong with each, by name."""
    wrong = {}
    for day, (spoil, why) in enumerate(IMPOSSIBLE.values(), 2):
        name = folder.path.name.replace("20260101", f"202601{day:02}")
        other = RunFolder(shutil.copytree(folder.path, folder.path.with_name(name)))
        edit(other, "run.json", run_id=name)
        spoil(other)
        wrong["/".join(other.path.parts[-3:])] = why
    return wrong


def test_bad_runs_are_named_and_the_other_is_shown(folder: RunFolder) -> None:
    wrong = spoilt_in_every_way(folder)
    (folder.path / "report.md").unlink(missing_ok=True)
    code, said = labs("report")
    told = dict(part.split(" cannot be read: ", 1) for part in said.split("Left out: ")[1:])
    assert (code, told.keys()) == (1, wrong.keys())
    assert [(name, why) for name, why in wrong.items() if why not in told[name]] == []
    assert (folder.path / "report.md").exists()


def test_a_token_in_a_log_is_found_and_a_large_run_is_searched_too(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder.path / "logs").mkdir()
    (folder.path / "logs" / "engine-on.log").write_text("/root/x hf_" + "a1B2" * 8)
    secret = "logs/engine-on.log holds what looks like a secret: revoke it, then remove it"
    assert checks.problems(folder) == [secret]
    monkeypatch.setattr(checks, "MOST_BYTES", 9000)
    found = checks.problems(folder)
    assert secret in found
    assert any("a run may have" in message for message in found)


def test_bad_runs_are_named_and_the_other_is_on_the_site(
    folder: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(site, "LABS", {LAB.name: LAB})  # committed/test_site.py writes every lesson
    bad = spoilt_in_every_way(folder)
    code, said = labs("site", "--out", str(tmp_path / "site"))
    assert code == 0
    assert [name for name in bad if f"Left out: {name} cannot be read: " not in said] == []
    pages = [path.name for path in (tmp_path / "site").glob("*/*/*.html")]
    assert pages == [f"{folder.path.name}.html"]


def test_a_machines_folder_that_is_a_link_is_not_followed(
    folder: RunFolder, tmp_path: Path
) -> None:
    machine = folder.path.parents[1]
    machine.rename(tmp_path / "elsewhere")
    machine.symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").rename(tmp_path.parent / f"{tmp_path.name}-elsewhere")
    machine.unlink()
    machine.symlink_to(tmp_path.parent / f"{tmp_path.name}-elsewhere")
    code, said = labs("report")
    assert (code, "is a link: a run lies in a folder of its own" in said) == (1, True)


def test_a_bomb_is_not_unpacked_beyond_its_bound(tmp_path: Path) -> None:
    (tmp_path / "bomb.gz").write_bytes(gzip.compress(bytes(64 * 2**20)))
    tracemalloc.start()
    with pytest.raises(DamagedError, match="unpacks to more than 2 MiB"):
        bounded.unpacked(tmp_path / "bomb.gz")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 * 2**20


def peak_bytes(read: Callable[[], object], why: str) -> int:
    """How much memory it takes to refuse something for this reason."""
    tracemalloc.start()
    with pytest.raises(ValueError, match=why):
        read()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_json_that_is_all_brackets_is_not_parsed(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few kilobytes would become gigabytes: each `[],` is an object of 64 bytes and more."""
    monkeypatch.setattr(bounded, "MOST_UNPACKED_BYTES", 256 * 2**20)
    dense = gzip.compress(b"[" + 6 * 2**20 * b"[]," + b"0]")
    home = folder.path / TRIAL
    places: dict[Path, Callable[[], object]] = {
        folder.probe_file("quality", "on"): lambda: folder.probe_result("quality", "on"),
        folder.probe_file("attention"): lambda: folder.probe_result("attention"),
        home / engine_series.FILE: lambda: engine_series.read(home),
    }
    for path, read in places.items():
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(dense)
        assert peak_bytes(read, "holds more than 4000000 values") < 64 * 2**20
        path.write_bytes(gzip.compress(bytes(33 * 2**20)))
        assert peak_bytes(read, "unpacks to more than 32 MiB") < 64 * 2**20
        path.unlink()
    (folder.path / "run.json").write_bytes(b"[" + 5 * 2**20 * b"[]," + b"0]")
    assert peak_bytes(folder.run, "holds more than 4000000 values") < 64 * 2**20


# ------------------------------------------------------------------------------- models and bundles

CONFIG = {
    "num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 2, "vocab_size": 16,
    "max_position_embeddings": 64, "intermediate_size": 8, "tie_word_embeddings": True,
}  # fmt: skip


def model_at(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    tensor = {"dtype": "BF16", "shape": [2, 2], "data_offsets": [0, 8]}
    write_shard(folder / "model.safetensors", {"x": tensor})
    return folder


def config(**fields: Any) -> Callable[[Path], object]:
    return lambda at: (at / "config.json").write_text(json.dumps(CONFIG | fields))


def shard(content: bytes) -> Callable[[Path], object]:
    return lambda at: (at / "model.safetensors").write_bytes(content)


def text_of(name: str, content: str) -> Callable[[Path], object]:
    return lambda at: (at / name).write_text(content)


DAMAGED: dict[str, Callable[[Path], object]] = {
    "cut config": text_of("config.json", "{"),
    "deep config": text_of("config.json", "[" * 10**5),
    "binary config": lambda at: (at / "config.json").write_bytes(b"\xff\xfe"),
    "no layers": text_of("config.json", "{}"),
    "no heads": config(num_attention_heads=0),
    "fraction": config(vocab_size=16.5),
    "empty shard": shard(b""),
    "cut weights": lambda at: shard((at / "model.safetensors").read_bytes()[:-1])(at),
    "endless header": shard(b"\xff\xff\xff\xff\xff\xff\xff\x7f{}"),
    "no offsets": shard(b'\x0e\0\0\0\0\0\0\0{"a":{"b": 1}}'),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_model_is_one_sentence(damage: str, tmp_path: Path) -> None:
    folder = model_at(tmp_path / "model")
    assert catalog.load(folder, "m").shape.layers == 2
    DAMAGED[damage](folder)
    with pytest.raises(ModelError, match=r"is not a model that can be read .*MODEL=") as failed:
        catalog.load(folder, "m")
    assert "\n" not in str(failed.value)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model": 1}', "[" * 10**5])
def test_a_damaged_tokenizer_is_one_sentence(content: str, tmp_path: Path) -> None:
    folder = model_at(tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text(content)
    with pytest.raises(ModelError, match=r"the tokenizer in .* cannot be read .*MODEL=") as failed:
        writer_of(catalog.load(folder, "m"))
    assert "\n" not in str(failed.value)


# --------------------------------------------------------------------------------------- markup

MARKUP = (
    '<img src=x onerror="alert(1)"><script>alert(1)</script>\n<!-- x -->&lt;b&gt; <http://e.vil>'
)


def test_text_from_outside_is_no_markup_in_a_report(folder: RunFolder) -> None:
    run = folder.run()
    claims = [{**claim, "title": MARKUP} for claim in run.lab["claims"]]
    lab = run.lab | {"title": MARKUP, "question": MARKUP, "claims": claims,
                     "limits": {"cpu": MARKUP}, "next_knobs": [MARKUP]}  # fmt: skip
    changed = {"model": MARKUP, "lab": lab, "changes": {"x": MARKUP}, "quick": True}
    write_json(folder.path / "run.json", run.model_copy(update=changed))
    path = folder.path / TRIAL / "trial.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "failed": MARKUP}))
    assert labs("report", str(folder.path))[0] == 0
    shown = (folder.path / "report.md").read_text()
    tokens = MarkdownIt("gfm-like", {"linkify": False}).parse(shown)
    every = [t for token in tokens for t in [token, *(token.children or [])]]
    html = {t.content.strip() for t in every if t.type.startswith("html")} - {FOLD_END}
    assert html  # a report's own folds, whose titles are its own
    assert all(re.fullmatch(r"<details>\n<summary>[\w ,-:]+</summary>", fold) for fold in html)
    links = [t.attrs["href"] for t in every if "href" in t.attrs]
    assert not any("e.vil" in str(link) for link in links)
    assert "onerror" in shown
