"""Finds the runs on file and reads each: a folder that can be read without this code.

This code computes the report from it again.

results/<machine>/machine.json          the hardware and its measured ceilings
results/<machine>/bench.json            how exact the lab's own instruments are, by `make bench`
results/<machine>/<lab>/<UTC>-<digest>/
    run.json            the resolved lab, seeds, argv, environment
    undecided.json      the points that were chosen for more repeats, if any were
    session.json        how the last session went
    predictions, trials, probes, summary
                        while it lasts each by itself (`storage.lasting`), then packed into a few
                        files (`storage.packed`)
    report.md  *.svg  report.html       computed from the above
    reproduction.md                     where the run repeats another: which figures agree
    reproductions/<run>.json.xz  README.md  where the run was repeated: how each repetition came out
    COMPLETE            written once every trial is there and none failed; packing comes after it
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from labs.harness.analysis.computed import Predictions, Summary
from labs.harness.analysis.measure import Trial
from labs.harness.spec.lab import Lab, LabError, Point
from labs.harness.spec.names import TrialName
from labs.harness.storage import bounded, packed
from labs.harness.storage.bounded import DamagedError, read_json
from labs.harness.storage.engine_series import Kept
from labs.harness.storage.lasting import LastingRun
from labs.harness.storage.packed import PackedRun
from labs.harness.storage.recorded import (
    MachineFile,
    Run,
    Session,
    TrialResult,
    Undecided,
    snapshot_from_json,
)
from labs.harness.storage.writing import write_json
from loadtests.records import RequestRecord
from serving.hardware import telemetry
from serving.hardware.machine import Machine
from serving.models.catalog import ROOT

T = TypeVar("T")
RESULTS = Path(os.environ.get("LABS_RESULTS") or ROOT / "results").resolve()
MOST_RECORDED_TOKENS = 10**8  # of a run

UNREADABLE = (
    ArithmeticError, AssertionError, AttributeError, LookupError, OSError, RecursionError,
    TypeError, ValueError,
)  # fmt: skip
"""The exceptions that reading damaged files of a run, or computing from them, may raise."""


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)


@contextlib.contextmanager
def readable(folder: RunFolder) -> Iterator[None]:
    """Raise DamagedError where the block cannot read a run's files, or compute from them.

    What it says of itself is passed on: a LabError, a disk that takes nothing more, or a file that
    lies elsewhere.
    """
    try:
        yield
    except LabError:
        raise
    except UNREADABLE as error:
        if isinstance(error, OSError) and (error.errno in FULL or _is_elsewhere(error, folder)):
            raise
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise DamagedError(f"{folder.path} cannot be read: {reason}") from error


def _is_elsewhere(error: OSError, folder: RunFolder) -> bool:
    named = error.filename
    return named is not None and not Path(str(named)).is_relative_to(folder.path)


def first_line(error: BaseException) -> str:
    """Return the beginning of what an error says, at most a line."""
    return str(error).strip().partition("\n")[0][:300]


class RunFolder:
    """Reads the files of one run, packed or not; a reader raises DamagedError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._manifest: tuple[object, Run] | None = None  # with the state of the file that it was
        self._lasting = LastingRun(path)

    @classmethod
    def create(cls, run: Run, results: Path | None = None) -> RunFolder:
        """Create the folder of a new run, with its manifest; under `RESULTS`, if nowhere else."""
        folder = cls((results or RESULTS) / run.machine.slug / run.lab["name"] / run.run_id)
        folder.path.mkdir(parents=True)
        write_json(folder.path / "run.json", run)
        return folder

    @property
    def machine_slug(self) -> str:
        """The name of the machine whose folder it is in."""
        return self.path.parent.parent.name

    @property
    def lab_name(self) -> str:
        """The name of the lab whose folder it is in."""
        return self.path.parent.name

    @property
    def place(self) -> str:
        """Its path below `results/`: machine/lab/run."""
        return "/".join(self.path.parts[-3:])

    @property
    def complete(self) -> bool:
        """Whether the run ended and no trial failed."""
        return (self.path / "COMPLETE").exists()

    @property
    def _files(self) -> PackedRun | LastingRun:
        """The reader of what is packed in the end."""
        return packed.opened(self.path) or self._lasting

    @property
    def is_packed(self) -> bool:
        """Whether its trials are in its packed files."""
        return self._files is not self._lasting

    def _read(self, read: Callable[[PackedRun | LastingRun], T]) -> T:
        """Read from the form that the run has: again where another process packed it meanwhile.

        Until then what is read may go, and then seem never to have been there.
        """
        if not self.is_packed:
            try:
                found = read(self._lasting)
            except (DamagedError, OSError):
                if not self.is_packed:
                    raise
            else:
                if not self.is_packed:
                    return found
        return read(self._files)

    def run(self) -> Run:
        """Read the manifest: once, unless its file changes. Raises DamagedError."""
        path = self.path / "run.json"
        state = bounded.state(path)
        if not self._manifest or self._manifest[0] != state:
            bounded.require_own_files(self.path)
            self._manifest = state, read_json(path, Run)
        return self._manifest[1]

    def predictions(self) -> Predictions:
        """Read what was predicted before the first engine started."""
        return self._read(lambda files: read_json(files.predictions_file, Predictions))

    def summary(self) -> Summary:
        """Read what was computed from the trials."""
        if not self.complete and not self.is_summarised:
            raise DamagedError(
                f"{self.path} has no summary: the run lasts, or was stopped before it had one;"
                " `make report RUN=..` computes one of what is there"
            )
        return self._read(lambda files: read_json(files.summary_file, Summary))

    @property
    def is_predicted(self) -> bool:
        """Whether its predictions are on file."""
        return self._read(lambda files: files.predictions_file.exists())

    @property
    def is_summarised(self) -> bool:
        """Whether its summary is on file."""
        return self._read(lambda files: files.summary_file.exists())

    def undecided(self) -> Undecided | None:
        """Read which points were chosen for more repeats; None where none has been."""
        path = self.path / "undecided.json"
        return read_json(path, Undecided) if path.exists() else None

    def session(self) -> Session | None:
        """Read how the last session went, if one ended."""
        path = self.path / "session.json"
        return read_json(path, Session) if path.exists() else None

    def probe_file(self, probe: str, variant: str = "") -> Path:
        """Return the path of a probe's result on a variant's engine, until the run is packed.

        What was asked once in the run, and of no engine, is without a variant.
        """
        return self._lasting.probe_file(f"{probe}-{variant}" if variant else probe)

    def probe_results(self) -> dict[str, Any]:
        """Read what each probe found, by the probe's name with its variant's behind it."""
        return self._read(lambda files: files.probes())

    def probe_result(self, probe: str, variant: str = "") -> dict[str, Any] | None:
        """Read the result of a probe, or of its quick form, on a variant's engine, if any."""
        behind = f"-{variant}" if variant else ""
        found: dict[str, Any] | None = self._read(
            lambda files: files.probe(f"{probe}{behind}") or files.probe(f"{probe}-quick{behind}")
        )
        return found

    def count(self) -> int:
        """Count the trials and probes on file."""
        return self._read(lambda files: files.count())

    def trial_folder(self, point: Point, repeat: int) -> Path:
        """Return the path of a trial's folder, which is there until the run is packed."""
        return self._lasting.trial_folder(str(TrialName(point.key, repeat)))

    def trial_result(self, point: Point, repeat: int) -> TrialResult | None:
        """Read what is known of a trial beside its requests, if the trial ended."""
        name = str(TrialName(point.key, repeat))
        return self._read(lambda files: files.trial_result(name))

    def trial_results(self, points: Sequence[Point], lab: Lab) -> list[TrialResult]:
        """Read what is known of all trials that ended, beside their requests."""
        trials = ((point, r) for point in points for r in range(1, lab.rounds + 1))
        return [result for trial in trials if (result := self.trial_result(*trial)) is not None]

    def records(self, point: str, repeat: int) -> list[RequestRecord]:
        """Read the records of a trial's requests. Raises DamagedError where there are none."""
        name = str(TrialName(point, repeat))
        return self._read(lambda files: files.records(name))

    def series(self, point: str, repeat: int) -> list[Kept]:
        """Read what was kept of the engine in a trial; [] where nothing was."""
        name = str(TrialName(point, repeat))
        return self._read(lambda files: files.series(name))

    def telemetry(self, point: str, repeat: int) -> list[telemetry.Sample]:
        """Read what was sampled of the hardware in a trial; [] where nothing was."""
        name = str(TrialName(point, repeat))
        return self._read(lambda files: files.telemetry(name))

    def trials(
        self, points: list[Point], lab: Lab
    ) -> Iterator[tuple[Point, TrialResult, Trial | None]]:
        """Yield every trial that ended, with its data unless it failed.

        None is kept here once the next is asked for: a run may be larger than memory. Raises
        DamagedError where the records of all together are larger than any run's.
        """
        left_tokens = MOST_RECORDED_TOKENS
        for point in points:
            for repeat in range(1, lab.rounds + 1):
                result = self.trial_result(point, repeat)
                if result is None:
                    continue
                trial = self.trial(point, result, lab)
                if trial is not None:
                    left_tokens -= sum(sum(r.chunks.tokens) for r in trial.records)
                if left_tokens < 0:
                    raise DamagedError(
                        f"{self.path}: its records count more than {MOST_RECORDED_TOKENS} tokens"
                    )
                yield point, result, trial
                del trial

    def trial(self, point: Point, result: TrialResult, lab: Lab) -> Trial | None:
        """Read a trial that ended; None where it failed. Raises DamagedError."""
        if result.failed or result.summary is None:
            return None
        try:
            engine = None if result.engine is None else snapshot_from_json(result.engine)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            where = str(TrialName(point.key, result.repeat))
            raise DamagedError(f"{self.path}, trial {where}, engine: {error!r}") from error
        return Trial(
            point,
            result.repeat,
            lab.slo,
            self.records(point.key, result.repeat),
            result.summary,
            engine,
            self.telemetry(point.key, result.repeat),
            result.other_work,
            point.workload.asked(lab.requests_of(point.workload), lab.draw_seed(result.repeat)),
            self.run().usd_per_hour if (self.path / "run.json").exists() else None,
            result.beside,
        )


def measured_elsewhere(run: Run) -> Machine | None:
    """Return the machine whose ceilings a run was held against, if these are another's on file.

    So it is with runs from before a CPU's caches told it from others that bear the same name.
    """
    for path in sorted(RESULTS.glob("*/machine.json")):
        file = read_json(path, MachineFile)
        if file.ceilings.measured_at == run.ceilings.measured_at:
            return None if file.machine.slug == run.machine.slug else file.machine
    return None


def all_runs() -> list[RunFolder]:
    """List the folders of all runs, the newest last."""
    return _newest_last(RESULTS.glob("*/*/*/run.json"))


def runs_of(machine: Path) -> list[RunFolder]:
    """List the runs in a machine's folder of results, wherever that lies, the newest last."""
    return _newest_last(machine.resolve().glob("*/*/run.json"))


def _newest_last(manifests: Iterable[Path]) -> list[RunFolder]:
    return [RunFolder(p.parent) for p in sorted(manifests, key=lambda p: p.parent.name)]


def open_run(path: Path) -> RunFolder:
    """Open the run in a folder, or the newest one of a lab.

    The path is taken from the working directory or from the checkout; raises LabError where neither
    holds a run, and no lab of that name has one.
    """
    newest = _newest_last(RESULTS.glob(f"*/{path.name}/*/run.json")) if len(path.parts) == 1 else []
    folders = [path, ROOT / path, *(run.path for run in newest[-1:])]
    folder = next((p for p in folders if (p / "run.json").exists()), None)
    if folder is None:
        raise LabError(
            f"{path} is not a run: give a folder with run.json, results/<machine>/<lab>/<run>, or"
            " the name of a lab for its newest run"
        )
    return RunFolder(folder.resolve())  # names of machine, lab and run come from the whole path
