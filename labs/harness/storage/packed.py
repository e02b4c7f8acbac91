"""The packed form of a complete run: its trials in a few files that are read without this code.

    trials.jsonl.xz     one line a trial: what its `trial.json` held
    requests.jsonl.xz   one line for up to 1,000 requests of a trial, in columns
    series.jsonl.xz     one line a series of an engine over a trial
    telemetry.jsonl.xz  one line a trial: what was sampled of the hardware, in columns
    probes.jsonl.xz     one line a probe of a variant's engine
    quality.json.xz     the logprobs of the quality probes, in columns

`xzcat` shows them, and `pandas.read_json(.., lines=True)` reads them. Only the files that have
something in them are there. `labs.harness.storage.packing` writes them.

Measured times of requests are whole microseconds, to which they are recorded. `sent_us` counts from
the trial's start, as `scheduled_s` and `first_answer_s` do, `first_byte_us` and `first_chunk_us`
from the send, `gaps_us` from chunk to chunk, and `end_us` from the last chunk, or from the send
where no chunk came. `tokens` is 1 where every chunk carried one.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import orjson

from labs.harness.storage import bounded, engine_series, quality_columns
from labs.harness.storage.bounded import DamagedError
from labs.harness.storage.recorded import TrialResult
from loadtests import records
from loadtests.records import RequestRecord
from serving.hardware.telemetry import Sample

TRIALS, REQUESTS, SERIES = "trials.jsonl.xz", "requests.jsonl.xz", "series.jsonl.xz"
TELEMETRY, PROBES, QUALITY = "telemetry.jsonl.xz", "probes.jsonl.xz", "quality.json.xz"
PREDICTIONS, SUMMARY = "predictions.json.xz", "summary.json.xz"
MOST_KEPT_CHUNKS = 2_000_000  # of the records that stay in memory, at 16 bytes each and more
BLOCK_REQUESTS, BLOCK_CHUNKS = 1_000, 200_000
AS_RECORDED = (
    "index",
    "asked_tokens",
    "scheduled_s",
    "prompt_tokens",
    "output_tokens",
    "in_window",
    "error",
)
Columns = dict[str, Any]


class KeptRecords:
    """Keeps the records of trials for whoever asks next; all go where there are too many."""

    def __init__(self) -> None:
        self._of: dict[object, list[RequestRecord]] = {}
        self._chunks = 0
        self.get = self._of.get

    def put(self, trial: object, found: list[RequestRecord]) -> None:
        """Keep the records of a trial."""
        chunks = sum(len(record.chunks) for record in found)
        if self._chunks + chunks > MOST_KEPT_CHUNKS:
            self._of.clear()
            self._chunks = 0
        self._of[trial] = found
        self._chunks += chunks


class PackedRun:
    """Reads the packed files of one run; each is parsed once, but for records that are too many.

    Trials are named `variant/workload/load/repeat`, probes `<probe>-<variant>`. What cannot be read
    raises DamagedError. `lasting.LastingRun` reads the same of a run that is not packed.
    """

    def __init__(self, home: Path) -> None:
        self._home = home
        self.predictions_file, self.summary_file = home / PREDICTIONS, home / SUMMARY
        self._kept = KeptRecords()
        self._stream = self._trials_records()

    def trial_result(self, trial: str) -> TrialResult | None:
        """Return what is known of a trial beside its requests; None where it did not end."""
        line = self._trials.get(trial)
        return None if line is None else bounded.validated(self._home / TRIALS, line, TrialResult)

    def records(self, trial: str) -> list[RequestRecord]:
        """Return the records of a trial's requests; an error where there are none."""
        if (kept := self._kept.get(trial)) is not None:
            return kept
        for _ in range(2):
            for name, found in self._stream:
                self._kept.put(name, found)
                if name == trial:
                    return found
            self._stream = self._trials_records()  # it may have been passed over
        raise DamagedError(f"{self._home / REQUESTS} has no requests of {trial}")

    def series(self, trial: str) -> list[engine_series.Kept]:
        """Return what was kept of the engine in a trial; [] where nothing was."""
        return engine_series.of_plain(self._series.get(trial, []), self._home / SERIES)

    def telemetry(self, trial: str) -> list[Sample]:
        """Return what was sampled of the hardware in a trial; [] where nothing was."""
        names = [field.name for field in fields(Sample)]
        try:
            return [
                Sample(**dict(zip(names, row, strict=True)))
                for columns in self._telemetry.get(trial, [])
                for row in zip(*(columns[name] for name in names), strict=True)
            ]
        except (KeyError, TypeError, ValueError) as error:
            raise DamagedError(f"{self._home / TELEMETRY}, {trial}: {error!r}") from error

    def probe(self, name: str) -> Any:
        """Return what a probe found; None where it was not made."""
        return self.probes().get(name)

    def probes(self) -> dict[str, Any]:
        """Return what each probe found, by its name."""
        return dict(self._probes)

    def count(self) -> int:
        """Count the trials and probes on file."""
        return len(self._trials) + sum(1 for _ in self._lines(PROBES))

    @functools.cached_property
    def _trials(self) -> dict[str, bytes]:
        """Map each trial to its own line."""
        lines = {}
        for line in bounded.lines(self._home / TRIALS):
            about = self._parsed(TRIALS, line)
            lines[f"{about.get('point')}/{about.get('repeat')}"] = line
        return lines

    @functools.cached_property
    def _series(self) -> dict[str, list[Columns]]:
        return self._by_trial(SERIES)

    @functools.cached_property
    def _telemetry(self) -> dict[str, list[Columns]]:
        return self._by_trial(TELEMETRY)

    @functools.cached_property
    def _probes(self) -> dict[str, Any]:
        parsed = [self._parsed(PROBES, line) for line in self._lines(PROBES)]
        try:
            found = {line["probe"]: line["result"] for line in parsed}
            if (self._home / QUALITY).exists():
                quality_columns.restore(found, bounded.parsed(self._home / QUALITY))
        except (LookupError, TypeError, ValueError) as error:
            raise DamagedError(f"{self._home / PROBES}: {error!r}") from error
        return found

    def _lines(self, name: str) -> Iterator[bytes]:
        path = self._home / name
        return bounded.lines(path) if path.exists() else iter(())

    def _parsed(self, name: str, line: bytes) -> Columns:
        try:
            parsed: Columns = orjson.loads(line)
            parsed.get("trial")
        except (orjson.JSONDecodeError, AttributeError) as error:
            raise DamagedError(f"{self._home / name}: {error}") from error
        return parsed

    def _by_trial(self, name: str) -> dict[str, list[Columns]]:
        found: dict[str, list[Columns]] = {}
        for line in self._lines(name):
            parsed = self._parsed(name, line)
            found.setdefault(str(parsed.pop("trial", "")), []).append(parsed)
        return found

    def _trials_records(self) -> Iterator[tuple[str, list[RequestRecord]]]:
        """Yield trial by trial, as they lie in the file."""
        current, found = "", list[RequestRecord]()
        for line in self._lines(REQUESTS):
            try:
                columns = orjson.loads(line)
                trial = str(columns.pop("trial"))
                if trial != current and found:
                    yield current, found
                    found = []
                current = trial
                found += of_columns(columns)
            except (LookupError, TypeError, ValueError, OverflowError, AttributeError) as error:
                raise DamagedError(f"{self._home / REQUESTS}: no requests ({error})") from error
        if found:
            yield current, found


def opened(home: Path) -> PackedRun | None:
    """Open a packed run; None where it is not packed. Of two runs what was parsed is kept."""
    state = bounded.state(home / TRIALS)
    return _opened(home, state) if state else None


@functools.lru_cache(maxsize=2)
def _opened(home: Path, _state: object) -> PackedRun:
    return PackedRun(home)


# ------------------------------------------------------------------------------ requests in columns


def blocks(found: Sequence[RequestRecord]) -> Iterator[list[RequestRecord]]:
    """Part the records of a trial into blocks that are parsed in bounded memory."""
    block, chunks = list[RequestRecord](), 0
    for record in found:
        if block and (len(block) == BLOCK_REQUESTS or chunks + len(record.chunks) > BLOCK_CHUNKS):
            yield block
            block, chunks = [], 0
        block.append(record)
        chunks += len(record.chunks)
    if block:
        yield block


def to_columns(block: Sequence[RequestRecord]) -> Columns:
    """Put records into columns, as this module's text says."""
    columns: Columns = {name: [getattr(record, name) for record in block] for name in AS_RECORDED}
    for name in records.OPTIONAL:
        values = [getattr(record, name) for record in block]
        if any(value is not None for value in values):
            columns[name] = values
    for record in block:
        for name, value in _times(record).items():
            columns.setdefault(name, []).append(value)
    return columns


def of_columns(columns: Mapping[str, Sequence[Any]]) -> list[RequestRecord]:
    """Make records of columns again. Raises ValueError, LookupError or TypeError."""
    names = list(columns)
    found = []
    for row in zip(*columns.values(), strict=True):
        values = dict(zip(names, row, strict=True))
        sent_us = values.pop("sent_us")
        first_us = values.pop("first_chunk_us")
        first_byte_us, end_us = values.pop("first_byte_us"), values.pop("end_us")
        gaps_us, tokens = values.pop("gaps_us"), values.pop("tokens")
        times_us: list[int] = []
        if first_us is not None:
            times_us = list(accumulate(gaps_us, initial=sent_us + first_us))
        sizes = [1] * len(times_us) if tokens == 1 else tokens
        last_us = times_us[-1] if times_us else sent_us
        record = RequestRecord(
            chunks=records.Chunks(zip((us / 1e6 for us in times_us), sizes, strict=True)),
            sent_s=sent_us / 1e6,
            first_byte_s=None if first_byte_us is None else (sent_us + first_byte_us) / 1e6,
            end_s=None if end_us is None else (last_us + end_us) / 1e6,
            **values,
        )
        records.require_possible(record)
        found.append(record)
    return found


def _times(record: RequestRecord) -> Columns:
    """Return the times of a record in whole microseconds, and the tokens of its chunks."""
    sent_us = round(record.sent_s * 1e6)
    times_us = [round(time_s * 1e6) for time_s in record.chunks.times_s]
    sizes = list(record.chunks.tokens)
    last_us = times_us[-1] if times_us else sent_us

    def since(time_s: float | None, start_us: int) -> int | None:
        return None if time_s is None else round(time_s * 1e6) - start_us

    return {
        "sent_us": sent_us,
        "first_byte_us": since(record.first_byte_s, sent_us),
        "first_chunk_us": times_us[0] - sent_us if times_us else None,
        "gaps_us": [b - a for a, b in pairwise(times_us)],
        "end_us": since(record.end_s, last_us),
        "tokens": 1 if sizes.count(1) == len(sizes) else sizes,
    }


def sample_columns(samples: Sequence[Sample]) -> Columns:
    """Put samples of the hardware into columns."""
    rows = [asdict(sample) for sample in samples]
    return {field.name: [row[field.name] for row in rows] for field in fields(Sample)}
