"""What a run leaves on disk: one folder, readable without this code, rebuilt into a report by it.

results/<machine>/machine.json          the hardware and its measured ceilings
results/<machine>/<lab>/<UTC>-<digest>/
    run.json            the resolved lab, seeds, argv, environment
    predictions.json    written before the first engine starts
    trials/<variant>/<workload>/<load>/<repeat>/requests.jsonl.gz  trial.json
    summary.json  report.md  *.svg      computed from the above
    COMPLETE            written last, and only when no trial failed
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import orjson
from pydantic import BaseModel, ValidationError

from labs.judge import Caveat, ForecastResult, Judgement
from labs.lab import Lab, LabError, Point, Prediction, digest_of
from labs.measure import Trial
from loadtests import records
from loadtests.plan import TrialSummary
from serving import metrics
from serving.machine import Ceilings, Environment, Machine
from serving.metrics import Histogram, Snapshot
from serving.models import ROOT, Shape

M = TypeVar("M", bound=BaseModel)
RESULTS = Path(os.environ.get("RESULTS", ROOT / "results")).resolve()
FORMAT_VERSION = 1
LEAST_FREE_BYTES = 300 * 2**20


class MachineFile(BaseModel, frozen=True, extra="forbid"):
    machine: Machine
    ceilings: Ceilings


class Run(BaseModel, frozen=True, extra="forbid"):
    """The manifest of a run: enough to repeat it and to compute its report again."""

    format_version: int = FORMAT_VERSION
    run_id: str
    lab: dict[str, Any]
    digest: str
    scale: str
    quick: bool
    changes: dict[str, Any]  # what SET changed; any makes the run ad hoc
    endpoint: str | None
    model: str
    dummy: bool = False  # the weights were random
    model_shape: dict[str, int]
    weights: dict[str, dict[str, int]] = {}  # variant -> shape, of those with other weights
    about: dict[str, Any] = {}  # derived model -> what its maker wrote down
    machine: Machine
    ceilings: Ceilings
    environment: Environment
    argv: dict[str, list[str]]  # variant -> the engine's command line, model path left out
    prompts_sha256: str
    started_at: str

    @property
    def ad_hoc(self) -> bool:
        return bool(self.changes) or self.endpoint is not None or self.aa

    @property
    def aa(self) -> bool:
        """The lab's baseline ran against itself."""
        return bool(self.lab.get("aa"))

    def rebuilt_lab(self) -> Lab:
        """The lab as it was run; its predictions are on file, its functions are not needed."""

        def gone(*_: object) -> Prediction:
            raise LookupError("a run on file has its predictions on file")

        fields = json.loads(json.dumps(self.lab))
        for part in (*fields["claims"], *fields["forecasts"]):
            part["predict"] = gone
        return Lab.model_validate(fields)

    def points(self) -> list[Point]:
        return self.rebuilt_lab().points(
            Shape(**self.model_shape),
            self.ceilings,
            {name: Shape(**shape) for name, shape in self.weights.items()},
            self.about,
        )


class Predictions(BaseModel, frozen=True, extra="forbid"):
    """`effects[claim][treatment|baseline]` and `forecasts[name][point]`."""

    effects: dict[str, dict[str, Prediction]]
    forecasts: dict[str, dict[str, Prediction]]


class TrialResult(BaseModel, frozen=True, extra="forbid"):
    """A trial's own file: what the records beside it cannot say."""

    point: str
    repeat: int
    failed: str | None = None  # why; then everything else is null
    summary: TrialSummary | None = None
    engine: dict[str, Any] | None = None
    cpu_steal: float | None = None  # share of CPU time taken by other guests of the host
    cpu_others: float | None = None  # by processes here that are not the run's
    took_s: float = 0.0


class Agreement(BaseModel, frozen=True, extra="forbid"):
    """The same counts seen three ways, over the trials of one session; None: not to be had."""

    what: str
    records: int
    prometheus: int | None
    engine: int | None


class Finding(BaseModel, frozen=True, extra="forbid"):
    """What a lab concludes beyond its claims: a table and sentences; `passed` where it can fail."""

    title: str
    rows: list[list[str]] = []  # the first is the header
    lines: list[str] = []
    passed: bool | None = None


class Summary(BaseModel, frozen=True, extra="forbid"):
    """Everything a report says, computed from the trials."""

    measurements: dict[str, dict[int, dict[str, float | None]]]
    pooled: dict[str, dict[str, float]]  # point -> percentile over the samples of all repeats
    judgements: list[Judgement]
    forecasts: list[ForecastResult]
    findings: list[Finding] = []
    caveats: list[Caveat]
    failed: dict[str, str]
    missing: int  # trials that were never played


class Session(BaseModel, frozen=True, extra="forbid"):
    """How one sitting at a run went: where its time went, and whether the counts agreed."""

    engine_start_s: float
    load_s: float
    wall_s: float
    resident: bool
    agreement: list[Agreement]
    prometheus: str | None  # why there was none


class RunFolder:
    """A run on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, run: Run) -> RunFolder:
        folder = cls(RESULTS / run.machine.slug / run.lab["name"] / run.run_id)
        folder.path.mkdir(parents=True)
        write_json(folder.path / "run.json", run)
        return folder

    @property
    def complete(self) -> bool:
        return (self.path / "COMPLETE").exists()

    def run(self) -> Run:
        return read_json(self.path / "run.json", Run)

    def predictions(self) -> Predictions:
        return read_json(self.path / "predictions.json", Predictions)

    def summary(self) -> Summary:
        return read_json(self.path / "summary.json", Summary)

    def session(self) -> Session | None:
        path = self.path / "session.json"
        return read_json(path, Session) if path.exists() else None

    def probe_file(self, probe: str, variant: str) -> Path:
        return self.path / "probes" / f"{probe}-{variant}.json.gz"

    def probed(self, probe: str, variant: str) -> dict[str, Any] | None:
        """What a probe, or its quick form, found on a variant's engine, if it was asked there."""
        for path in (self.probe_file(name, variant) for name in (probe, f"{probe}-quick")):
            if path.exists():
                found: dict[str, Any] = orjson.loads(gzip.decompress(path.read_bytes()))
                return found
        return None

    def trial_folder(self, point: Point, repeat: int) -> Path:
        return self.path / "trials" / point.key / str(repeat)

    def trial_result(self, point: Point, repeat: int) -> TrialResult | None:
        path = self.trial_folder(point, repeat) / "trial.json"
        return read_json(path, TrialResult) if path.exists() else None

    def trials(
        self, points: list[Point], lab: Lab
    ) -> Iterator[tuple[Point, TrialResult, Trial | None]]:
        """Every trial that ended, with its data unless it failed."""
        for point in points:
            for repeat in range(1, lab.rounds + 1):
                result = self.trial_result(point, repeat)
                if result is None:
                    continue
                if result.failed or result.summary is None:
                    yield point, result, None
                    continue
                path = self.trial_folder(point, repeat) / "requests.jsonl.gz"
                engine = None if result.engine is None else snapshot_from(result.engine)
                yield (
                    point,
                    result,
                    Trial(point, repeat, lab.slo, list(records.read(path)), result.summary, engine),
                )


def run_id(digest: str) -> str:
    return f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{digest}"


def snapshot_json(snapshot: Snapshot) -> dict[str, Any]:
    """The engine metrics the lab knows by name, as plain JSON."""
    return {
        "values": {n: v for n, v in snapshot.values.items() if metrics.is_known(n)},
        "histograms": {
            n: {**asdict(h), "le": [str(b) for b in h.le]}
            for n, h in snapshot.histograms.items()
            if n in metrics.HISTOGRAMS
        },
        "info": snapshot.info,
    }


def snapshot_from(plain: dict[str, Any]) -> Snapshot:
    return Snapshot(
        plain["values"],
        {
            n: Histogram(tuple(map(float, h["le"])), tuple(h["counts"]), h["sum"], h["count"])
            for n, h in plain["histograms"].items()
        },
        plain["info"],
    )


def write_json(path: Path, model: BaseModel) -> None:
    _write(path, (json.dumps(model.model_dump(mode="json"), indent=1) + "\n").encode())


def write_gzip(path: Path, plain: Any) -> None:
    """Gzip'd JSON, whole or not at all."""
    _write(path, gzip.compress(orjson.dumps(plain, option=orjson.OPT_NON_STR_KEYS), mtime=0))


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(f".{path.name}.half")
    half.write_bytes(content)
    half.rename(path)


def read_json(path: Path, kind: type[M]) -> M:
    return kind.model_validate_json(path.read_text())


def require_space(path: Path) -> None:
    """Raises LabError when a run's files might not fit."""
    free = shutil.disk_usage(path).free
    if free < LEAST_FREE_BYTES:
        raise LabError(
            f"{free / 2**20:.0f} MiB are free under {path}, a run needs"
            f" {LEAST_FREE_BYTES / 2**20:.0f}: make room and run again"
        )


def all_runs() -> list[RunFolder]:
    """Newest last."""
    found = RESULTS.glob("*/*/*/run.json")
    return [RunFolder(p.parent) for p in sorted(found, key=lambda p: p.parent.name)]


def latest(lab: str, complete: bool = True) -> RunFolder | None:
    found = [f for f in all_runs() if f.path.parent.name == lab and f.complete == complete]
    return found[-1] if found else None


def problems(folder: RunFolder) -> list[str]:
    """What is wrong with a run on file; empty when it is well formed."""
    wrong = []
    try:
        run, lab = folder.run(), folder.run().rebuilt_lab()
        folder.predictions(), folder.summary()
        if run.digest != digest_of(run.lab):
            wrong.append("its lab was changed after the run: the digest is another")
        if run.digest not in folder.path.name:
            wrong.append("its folder does not carry its digest")
        if run.machine.slug != folder.path.parent.parent.name:
            wrong.append("its folder is under another machine's name")
        for point in run.points():
            for repeat in range(1, lab.repeats + 1):
                if folder.complete and folder.trial_result(point, repeat) is None:
                    wrong.append(f"trial {point.key}/{repeat} is missing")
        list(folder.trials(run.points(), lab))
    except (OSError, ValidationError, ValueError, KeyError, TypeError) as error:
        wrong.append(f"it cannot be read: {str(error).splitlines()[0]}")
    if not folder.complete:
        wrong.append("it has no COMPLETE")
    return wrong
