"""The packed form of a run: as the run was, in a few files, whatever ends the packing."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import lzma
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson
import pytest

from labs.harness.analysis.evaluation import Passage
from labs.harness.analysis.quality import _first as first_of
from labs.harness.analysis.quality import kl_divergence
from labs.harness.derived.design import sampling_of
from labs.harness.derived.summarize import all_problems, computed, summarise
from labs.harness.runner import backfill, resume
from labs.harness.storage import bounded, engine_series, packed, packing, quality_columns
from labs.harness.storage.bounded import DamagedError
from labs.harness.storage.results import RunFolder
from labs.harness.storage.writing import write_gzip
from loadtests import records
from loadtests.records import Chunks, RequestRecord
from serving import atomic, metrics
from serving.hardware import telemetry
from serving.hardware.telemetry import Sample
from tests.unit.builders import make_record, write_run

POINT, TRIAL = "on/short/concurrent-1", "trials/on/short/concurrent-1/1"
SERIES = {
    "name": metrics.KV_USAGE, "labels": {}, "times_s": [1.0, 2.0], "values": [0.25, 0.5],
}  # fmt: skip
SAMPLES = [Sample(10.0, "0", power_w=99.5, throttle=""), Sample(11.0, "1", throttle="power cap")]


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A complete run with everything that a trial may keep."""
    folder = write_run(tmp_path)
    home = folder.path / TRIAL
    write_gzip(home / engine_series.FILE, [SERIES])
    telemetry.write(home / "telemetry.csv.gz", SAMPLES, 10.0)
    write_gzip(folder.probe_file("salt", "on"), {"took_s": 1.5})
    write_gzip(folder.probe_file("attention"), {"heads": 0})
    return folder


def contents(folder: RunFolder) -> dict[str, bytes]:
    files = (path for path in sorted(folder.path.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder.path)): path.read_bytes() for path in files}


def told(folder: RunFolder) -> dict[str, Any]:
    """All that a run says."""
    return {**read(folder), "computed": computed(RunFolder(folder.path))}


def read(folder: RunFolder) -> dict[str, Any]:
    """All that is read of a run."""
    run = RunFolder(folder.path)
    manifest = run.run()
    points, lab = manifest.points(), manifest.rebuilt_lab()
    return {
        "manifest": manifest,
        "predictions": run.predictions(),
        "filed": run.summary(),
        "trials": [(r, t and t.records, t and t.engine) for _, r, t in run.trials(points, lab)],
        "series": run.series(POINT, 1),
        "telemetry": run.telemetry(POINT, 1),
        "probes": run.probe_results(),
        "count": run.count(),
        "sampling": sampling_of(run, points, lab),
    }


def test_a_packed_run_says_what_it_said_and_has_few_files(folder: RunFolder) -> None:
    before = told(folder)
    assert packing.pack(folder)
    assert told(folder) == before
    assert sorted(contents(folder)) == [
        "COMPLETE", "predictions.json.xz", "probes.jsonl.xz", "requests.jsonl.xz", "run.json",
        "series.jsonl.xz", "summary.json.xz", "telemetry.jsonl.xz", "trials.jsonl.xz",
    ]  # fmt: skip
    assert all_problems(folder) == []
    summarise(folder)  # as `make report` does
    assert told(folder) == before
    assert not packing.pack(folder)


def test_the_same_run_gives_the_same_bytes(folder: RunFolder, tmp_path: Path) -> None:
    other = RunFolder(tmp_path / "elsewhere" / folder.path.name)
    shutil.copytree(folder.path, other.path)
    packing.pack(folder), packing.pack(other)
    assert contents(folder) == contents(other)


def test_a_run_that_is_not_complete_is_left_as_it_is(folder: RunFolder) -> None:
    (folder.path / "COMPLETE").unlink()
    before = contents(folder)
    assert not packing.pack(folder)
    assert contents(folder) == before


def test_packed_files_are_read_without_this_code(folder: RunFolder) -> None:
    packing.pack(folder)
    with lzma.open(folder.path / packed.REQUESTS, "rt") as file:
        requests = {line["trial"]: line for line in map(json.loads, file)}
    assert len(requests) == len(told(folder)["trials"])
    ttft_s = [us / 1e6 for us in requests[f"{POINT}/1"]["first_chunk_us"]]
    assert ttft_s == [r.chunks[0][0] - r.sent_s for r in folder.records(POINT, 1)]


def test_what_does_not_come_back_as_it_was_is_not_packed(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = told(folder)
    to_columns, sync = packed.to_columns, atomic.sync

    def shifting(block: Sequence[RequestRecord]) -> packed.Columns:
        columns = to_columns(block)
        return {**columns, "sent_us": [us + 2 for us in columns["sent_us"]]}

    def damaging(path: Path) -> None:
        sync(path)
        if packed.SERIES in path.name:
            path.write_bytes(lzma.compress(b"{}\n"))

    for owner, name, fault in ((packed, "to_columns", shifting), (atomic, "sync", damaging)):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fault)
            with pytest.raises(DamagedError):
                packing.pack(folder)
        assert told(folder) == before
        assert not folder.is_packed
    assert packing.pack(folder)


def test_two_that_pack_one_run_take_turns(folder: RunFolder) -> None:
    before = contents(folder)
    packs = threading.Thread(target=packing.pack, args=(RunFolder(folder.path),))
    with packing._alone(folder.path):
        packs.start()
        packs.join(0.2)
        assert packs.is_alive()
        assert contents(folder) == before
    packs.join()
    assert contents(folder) != before
    assert not packing.pack(folder)


def test_what_is_computed_while_a_run_is_packed_stays(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packing has read the summary already when another process writes it anew."""
    newer = folder.summary().model_copy(update={"missing": 7})
    writes = threading.Thread(
        target=packing.write_summary, args=(RunFolder(folder.path), newer), daemon=True
    )
    write = packing._write

    def beside(path: Path, lines: Iterable[packing.Line]) -> None:
        write(path, lines)
        if path.name == packed.PROBES:
            writes.start()
            writes.join(0.2)

    monkeypatch.setattr(packing, "_write", beside)
    assert packing.pack(folder)
    writes.join()
    assert folder.summary() == newer
    assert not packing.pack(folder)


READERS: dict[str, Callable[[RunFolder], Any]] = {
    "predictions": RunFolder.predictions,
    "summary": RunFolder.summary,
    "is_predicted": lambda run: run.is_predicted,
    "is_summarised": lambda run: run.is_summarised,
    "probe_results": RunFolder.probe_results,
    "probe_result": lambda run: run.probe_result("salt", "on"),
    "count": RunFolder.count,
    "trial_result": lambda run: run.trial_result(run.run().points()[-1], 1),
    "records": lambda run: run.records(POINT, 1),
    "series": lambda run: run.series(POINT, 1),
    "telemetry": lambda run: run.telemetry(POINT, 1),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_run_that_is_packed_between_a_look_and_a_read_is_read(
    folder: RunFolder, reader: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = READERS[reader](folder)
    opened = packed.opened

    def then_packed(home: Path) -> packed.PackedRun | None:
        found = opened(home)
        if found is None:
            monkeypatch.setattr(packed, "opened", opened)
            packing.pack(RunFolder(home))
        return found

    monkeypatch.setattr(packed, "opened", then_packed)
    assert READERS[reader](RunFolder(folder.path)) == before
    assert before
    assert not (folder.path / "trials").exists()


def test_folders_that_go_while_a_run_is_looked_through_are_no_fault(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    scandir = os.scandir

    def going(place: str) -> Any:
        if Path(place).name == "trials":
            monkeypatch.setattr(os, "scandir", scandir)
            packing.pack(folder)
        return scandir(place)

    monkeypatch.setattr(os, "scandir", going)
    bounded.require_own_files(folder.path)
    assert not (folder.path / "trials").exists()


STEPS = (
    (os, "fsync"),
    (Path, "rename"),
    (Path, "unlink"),
    (shutil, "rmtree"),
    (os, "rmdir"),
    (lzma.LZMAFile, "close"),
)
"""What packing does to the disk; a kill comes before one of them."""


def _pack_until(folder: RunFolder, last: int) -> bool:
    """Pack in a process that is killed before a step; tell whether it was, or had ended."""
    child = os.fork()
    if not child:
        step = itertools.count()

        def counted(act: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(act)
            def wrapped(*arguments: Any, **options: Any) -> Any:
                if next(step) == last:
                    os.kill(os.getpid(), signal.SIGKILL)
                return act(*arguments, **options)

            return wrapped

        for owner, name in STEPS:
            setattr(owner, name, counted(getattr(owner, name)))
        packing.pack(folder)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def test_a_kill_at_any_step_of_packing_loses_nothing(folder: RunFolder, tmp_path: Path) -> None:
    before = read(folder)
    unhurt = RunFolder(tmp_path / "unhurt" / folder.path.name)
    shutil.copytree(folder.path, unhurt.path)
    packing.pack(unhurt)
    for last in itertools.count(0, 3):  # each kind of step comes up for several files
        killed = RunFolder(tmp_path / str(last) / "tiny" / folder.path.name)
        shutil.copytree(folder.path, killed.path)
        was_killed = _pack_until(killed, last)
        assert read(killed) == before, f"killed before step {last}"
        packing.pack(killed)
        left = {name: of for name, of in contents(killed).items() if not name.endswith(".half")}
        assert left == contents(unhurt), f"killed before step {last}"
        if not was_killed:
            break
    assert last > 30


def test_a_run_that_was_killed_while_it_was_packed_is_not_continued(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = folder.run()
    for last in (0, 25):
        _pack_until(folder, last)
        monkeypatch.setattr(resume, "RESULTS", folder.path.parents[2])
        assert resume.unfinished(run) is None


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[packed.Columns]:
    """The blocks of requests that were made records."""
    parsed, of_columns = list[packed.Columns](), packed.of_columns

    def counted(columns: packed.Columns) -> list[RequestRecord]:
        parsed.append(columns)
        return of_columns(columns)

    monkeypatch.setattr(packed, "of_columns", counted)
    return parsed


def test_records_are_parsed_once_unless_they_are_too_many(
    folder: RunFolder, parsed: list[packed.Columns], monkeypatch: pytest.MonkeyPatch
) -> None:
    packing.pack(folder)
    parsed.clear()
    before = told(folder)
    once = len(parsed)
    assert once == len(before["trials"])
    monkeypatch.setattr(packed, "MOST_KEPT_CHUNKS", 3)
    (folder.path / packed.TRIALS).touch()  # it is another file now
    assert told(folder) == before
    assert len(parsed) > 3 * once


def test_an_import_reads_a_packed_run_twice_and_no_trial_by_itself(
    folder: RunFolder, parsed: list[packed.Columns], monkeypatch: pytest.MonkeyPatch
) -> None:
    packing.pack(folder)
    parsed.clear()
    monkeypatch.setattr(packed, "MOST_KEPT_CHUNKS", 3)
    trials = backfill._trials(folder)[::-1]  # for their lengths
    assert list(backfill._all(folder, trials, {trials[0].name: 0.0, trials[-1].name: 0.0}, False))
    assert len(parsed) == 2 * len(trials)


def odd_records() -> list[RequestRecord]:
    plain = make_record([(11.000001, 1), (11.5, 2)], index=0, first_byte_s=10.9)
    return [
        plain,
        dataclasses.replace(plain, index=1, scheduled_s=0.1 + 0.2, text="é", choice=1),
        dataclasses.replace(plain, index=2, chunks=Chunks([]), error="HTTP 503", end_s=None),
        dataclasses.replace(plain, index=3, chunks=Chunks([]), output_tokens=None, end_s=12.25),
    ]


def test_columns_give_every_field_of_a_request_back() -> None:
    assert packed.of_columns(packed.to_columns(odd_records())) == odd_records()


def test_a_block_of_requests_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [len(block) for block in packed.blocks(odd_records() * 300)] == [1000, 200]
    monkeypatch.setattr(packed, "BLOCK_CHUNKS", 3)
    assert [len(block) for block in packed.blocks(odd_records())] == [1, 3]
    assert list(packed.blocks([])) == []


def probe(*known: dict[int, float]) -> dict[str, Any]:
    known_of = [{str(i): logprob for i, logprob in of.items()} for of in known]
    passage = {"token_ids": [0] * len(known), "known": known_of}
    return {"answers": [{"model": "m", "passages": [passage], "took_s": 1.0}]}


def kept(*of_variants: dict[int, float]) -> list[Mapping[int, float]]:
    """What comes out of the columns of a text of one token, 0, that these variants scored."""
    taken = {f"quality-{number}": probe(known) for number, known in enumerate(of_variants)}
    columns = quality_columns.take(taken, list(taken))
    assert columns
    assert all("passages" not in of["answers"][0] for of in taken.values())
    quality_columns.restore(taken, orjson.loads(orjson.dumps(columns)))
    passages = [Passage.model_validate(of["answers"][0]["passages"][0]) for of in taken.values()]
    return [passage.known[0] for passage in passages]


def test_logprobs_of_sixteen_bits_come_back_to_their_last_decimal() -> None:
    base, other = {3: -0.83307, 0: -2.58307, 2: -3.33307}, {0: -0.41234, 3: -2.66234}
    again = kept(base, other)
    assert [list(known.values()) for known in again] == [[*base.values()], [-2.66234, -0.41234]]
    assert [known[0] for known in again] == [-2.58307, -0.41234]


def test_a_logprob_between_the_steps_is_near_and_what_no_figure_needs_is_left_out() -> None:
    base, other = {0: -0.12345, 1: -2.71828}, {0: -0.2, 1: -3.1, 7: -0.1, 9: -5.0}
    again = kept(base, other)
    assert [*again[0].values()] == pytest.approx([-0.12345, -2.71828], abs=1.3e-4)
    assert [*again[1].values()] == pytest.approx([-0.2, -3.1, -0.1], abs=1.3e-4)
    assert kl_divergence(*again) == pytest.approx(kl_divergence(base, other), rel=1e-3)


def test_of_tokens_that_tie_for_the_likeliest_the_same_one_counts() -> None:
    tied = {9: -0.5, 4: -0.5, 0: -2.0}
    (again,) = kept(tied)
    assert first_of(again) == first_of(tied) == 4


def test_probes_of_other_texts_stay_as_they_are() -> None:
    taken = {"quality-base": probe({0: -1.0}), "quality-on": probe({0: -1.0}, {0: -2.0})}
    assert quality_columns.take(taken, list(taken)) is None
    assert quality_columns.take({}, []) is None


@pytest.mark.parametrize("name", [packed.TRIALS, packed.REQUESTS, packed.SERIES, packed.PROBES])
@pytest.mark.parametrize("content", [b"[]\n", b"{", b'{"trial": 1}\n', b"no xz"])
def test_a_damaged_packed_file_is_one_sentence(
    folder: RunFolder, name: str, content: bytes
) -> None:
    packing.pack(folder)
    is_packed = content != b"no xz"
    (folder.path / name).write_bytes(lzma.compress(content) if is_packed else content)
    problems = all_problems(folder)
    unread = name in (packed.SERIES, packed.PROBES)  # no figure of this run needs them
    assert unread or any("cannot be read" in p or "is missing" in p for p in problems)
    if name == packed.SERIES and content != b'{"trial": 1}\n':
        with pytest.raises(DamagedError):
            folder.series(POINT, 1)


def test_xz_is_unpacked_in_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded, "MOST_PARSED_BYTES", 2**21)
    bomb = tmp_path / "bomb.xz"
    bomb.write_bytes(lzma.compress(bytes(2**23)))
    with pytest.raises(DamagedError, match="line of more than"):
        list(bounded.lines(bomb))
    large = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 2**30}]
    bomb.write_bytes(lzma.compress(b"{}\n", filters=large))
    with pytest.raises(DamagedError, match="damaged"):
        list(bounded.lines(bomb))
    for cut in (lzma.compress(b"{}\n")[:-4], lzma.compress(b"{}\n") + b"x"):
        bomb.write_bytes(cut)
        with pytest.raises(DamagedError, match="damaged"):
            list(bounded.lines(bomb))


def test_records_of_a_trial_that_is_not_there_are_missed(folder: RunFolder) -> None:
    packing.pack(folder)
    with pytest.raises(DamagedError, match="no requests of"):
        folder.records(POINT, 9)
    assert records.OPTIONAL == ("text", "model", "choice", "alike_tokens", "first_answer_s")
