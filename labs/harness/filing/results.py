"""Defines what a run leaves on disk: a folder that can be read without this code.

This code computes the report from it again.

results/<machine>/machine.json          the hardware and its measured ceilings
results/<machine>/bench.json            how exact the lab's own instruments are, by `make bench`
results/<machine>/<lab>/<UTC>-<digest>/
    run.json            the resolved lab, seeds, argv, environment
    predictions.json    written before the first engine starts
    undecided.json      the points that were chosen for more repeats, if any were
    session.json        how the last session went
    probes/*.json.gz    what was asked of the engines beside the load; attention timed by itself
    trials/<variant>/<workload>/<load>/<repeat>/requests.jsonl.gz  trial.json
                        telemetry.csv.gz    on a GPU; on a CPU where its energy can be read
                        engine-series.json.gz   where Prometheus scraped the engine's metrics
    summary.json  report.md  *.svg  report.html     computed from the above
    *.xz                once the run is complete, in the place of probes/, trials/, the
                        predictions and the summary: `filing.packed` describes them
    reproduction.json  .md              where the run repeats another: which figures agree
    reproductions/<run>.json.xz  README.md  where the run was repeated: a copy from each repetition
    COMPLETE            written last, and only when no trial failed
"""

from __future__ import annotations

import contextlib
import errno
import gzip
import json
import lzma
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import orjson
from pydantic import (
    AfterValidator,
    BaseModel,
    Field,
    FiniteFloat,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from labs.harness.filing import bounded, engine_series, packed
from labs.harness.filing.bounded import DamagedError
from labs.harness.filing.engine_series import Kept
from labs.harness.filing.packed import PackedRun
from labs.harness.judging.checks.expected import Expected, Served
from labs.harness.judging.checks.transport import is_one_stream
from labs.harness.judging.judge import (
    Caveat,
    ForecastAtPoint,
    ForecastResult,
    Interval,
    Judgement,
    Sampling,
    figure,
    over_repeats,
)
from labs.harness.judging.machine_speed import MachineSpeed, TimedTrial
from labs.harness.judging.measure import OtherWork, Trial
from labs.harness.judging.signals import Watch
from labs.harness.judging.timeline import Timeline
from labs.harness.judging.validity import undisturbed_transport_s
from labs.harness.names import PairName, PointName, TrialName
from labs.harness.spec import (
    NOT_FILED,
    OF_FORECASTS,
    Claim,
    Lab,
    LabError,
    Point,
    Prediction,
    knobs,
)
from loadtests import records
from loadtests.plan import TrialSummary
from loadtests.records import RequestRecord
from loadtests.workload import Name
from serving import metrics, whole
from serving.engines.flags import FlagValue
from serving.hardware import telemetry
from serving.hardware.attention import AttentionTimes
from serving.hardware.machine import Ceilings, Environment, Machine
from serving.hardware.reference_step import ReferenceStep
from serving.metrics import Histogram, KvUse, Snapshot
from serving.weights.models import ROOT, Shape

M = TypeVar("M", bound=BaseModel)
RESULTS = Path(os.environ.get("LABS_RESULTS") or ROOT / "results").resolve()
FORMAT_VERSION = 2  # 1 hashed whole files of requests, and not only what is sent
AT = " at "  # between what a lab's arithmetic is of and at which size
LEAST_FREE_BYTES = 300 * 2**20
MOST_RECORDED_TOKENS = 10**8  # of a run


def _shape(sizes: dict[str, int]) -> dict[str, int]:
    try:
        Shape(**sizes)
    except TypeError as error:
        raise ValueError("no shape of a model") from error
    return sizes


Sizes = Annotated[
    dict[str, Annotated[int, Field(ge=0, le=10**16)]], AfterValidator(_shape)
]  # of a Shape
_NAME: TypeAdapter[str] = TypeAdapter(Name)


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


class MachineFile(BaseModel, frozen=True, extra="forbid"):
    """The content of `machine.json`: the hardware and its measured ceilings."""

    machine: Machine
    ceilings: Ceilings


class Run(BaseModel, frozen=True, extra="forbid"):
    """The manifest of a run: enough to repeat it and to compute its report again."""

    format_version: int = FORMAT_VERSION
    run_id: Name
    lab: dict[str, Any]
    digest: Name
    scale: str
    quick: bool
    changes: dict[str, Any]  # by SET=; any change makes the run ad hoc
    endpoint: str | None
    replicas: list[str] = []  # the engines behind it, whose metrics were added up
    load_workers: Annotated[int, Field(exclude=True)] = 0  # in older runs, and read by nobody
    engine_command: list[str] | None = None  # in the place of the engines' own; None: not recorded
    model: str
    dummy: bool = False  # the weights were random
    model_shape: Sizes
    weights: dict[str, Sizes] = {}  # variant -> shape, of those with other weights
    about: dict[str, Any] = {}  # derived model -> what its maker wrote down
    machine: Machine
    ceilings: Ceilings
    environment: Environment
    argv: dict[str, list[str]]  # variant -> the engine's command line, model path left out
    model_revision: str | None = None  # where the model is from Hugging Face
    model_files: dict[str, str] = {}  # file -> SHA-256, including the tokenizer's
    derived_sha256: dict[str, str] = {}  # derived model -> SHA-256 over its files
    served: dict[str, Served] = {}  # variant -> the weights that its engine is to load
    # that all prompts begin with by the chat template; in old runs those after the text, too
    template_tokens: int | None = None
    endpoint_metrics: bool | None = None  # whether the endpoint showed metrics at the start
    prompts_sha256: str
    reproduces: Name | Literal[""] = ""  # the run that this one repeats; it is in no summary table
    usd_per_hour: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None  # as was given
    started_at: str

    @model_validator(mode="after")
    def _parts_can_be_read(self) -> Self:
        """Check what is read of the parts that are plain here."""
        datetime.fromisoformat(self.started_at)
        if not isinstance(self.lab.get("title"), str):
            raise ValueError("the lab has no title")
        for part in ("variants", "workloads", "claims", "forecasts", "answers"):
            if not isinstance(self.lab.get(part), list | tuple):
                raise ValueError(f"the lab's {part} are not a list")
        for named in (self.lab, *self.lab["variants"], *self.lab["workloads"]):
            _NAME.validate_python(named.get("name") if isinstance(named, dict) else named)
        return self

    @property
    def ad_hoc(self) -> bool:
        """Whether it stays out of summary tables: changed settings, an endpoint, or an A/A run."""
        return bool(self.changes) or self.endpoint is not None or self.aa

    @property
    def aa(self) -> bool:
        """Whether the lab's baseline ran against itself."""
        return bool(self.lab.get("aa"))

    @property
    def in_float32(self) -> bool:
        """Whether its engines held weights of 16 bits in float32."""
        return Shape(**self.model_shape).in_float32

    def rebuilt_lab(self) -> Lab:
        """Rebuild the lab as it was run, without its functions: its predictions are on file."""
        return lab_from_resolved(self.lab)

    def expected(self, predictions: Predictions) -> Expected:
        """Say what its trials must show; what an old run did not record is not asked for."""
        forecasts = predictions.in_virtual_time or PointForecasts(points={})
        found = {key: bands.get("prefix_hit_rate") for key, bands in forecasts.points.items()}
        return Expected(
            evidence=() if self.endpoint else self.rebuilt_lab().evidence,
            endpoint=self.endpoint is not None,
            metrics_read=self.endpoint is None or bool(self.endpoint_metrics),
            on_gpus=(
                self.endpoint is None
                and self.machine.kind == "gpu"
                and "compute_mode" in self.environment.model_fields_set  # it says what it asked
            ),
            gpu_part=self.endpoint is None and self.machine.parts is not False,
            model="" if self.endpoint else self.model,
            template_tokens=self.template_tokens,
            served=self.served,
            acceptance=predictions.acceptance,
            least_copied={key: band.low for key, band in forecasts.copied.items()},
            least_hit_rate={key: band.low for key, band in found.items() if band},
            least_found=forecasts.least_found,
        )

    def points(self) -> list[Point]:
        """Rebuild the points that were run."""
        return self.rebuilt_lab().points(
            Shape(**self.model_shape),
            self.ceilings,
            {name: Shape(**shape) for name, shape in self.weights.items()},
            self.about,
        )


def lab_from_resolved(resolved: Mapping[str, Any], like: Lab | None = None) -> Lab:
    """Rebuild a lab from its plain form.

    Whatever predicts is a function of `like`. Without one, predicting a claim or a forecast raises
    LookupError, and the lab has none of NOT_FILED. Raises DamagedError where today's code cannot
    read the lab.
    """

    def missing(*_: object) -> Prediction:
        raise LookupError("a run on file has its predictions on file")

    fields = json.loads(json.dumps(resolved))
    fields |= {"scales": {}, "quick": {}}  # they have been applied
    fields.setdefault("most_repeats", 0)  # a run from before labs could go on did not
    try:
        if any(isinstance(workload.get("trace"), str) for workload in fields["workloads"]):
            raise ValueError("a recorded trace is a list, and this one names a file")
        for kind in ("claims", "forecasts"):
            predict = {part.name: part.predict for part in getattr(like, kind, ())}
            for part in fields[kind]:
                part["predict"] = predict.get(part["name"], missing)
        beside = {name: getattr(like, name) for name in NOT_FILED} if like else {}
        return Lab.model_validate(fields | beside)
    except ValidationError as error:
        raise DamagedError(f"its lab{_first_error(error)}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"its lab cannot be read: {error!r}") from error


def fresh_knobs(resolved: Mapping[str, Any]) -> dict[str, Any]:
    """Read a resolved lab's settings with today's code: a field added since has its default."""
    return knobs(lab_from_resolved(resolved).resolved())


class Band(BaseModel, frozen=True, extra="forbid"):
    """A forecast figure, and the bounds between which it is expected.

    The value is a mean over plays. There is no geometric mean where a play had 0, and in runs
    before it was introduced.
    """

    value: FiniteFloat
    low: FiniteFloat
    high: FiniteFloat
    geometric_mean: FiniteFloat | None = None


class Searched(BaseModel, frozen=True, extra="forbid"):
    """A point of which only a forecast is made: its flags, and its figures in one play."""

    flags: dict[str, FlagValue]
    figures: dict[str, FiniteFloat]  # by metric


SEARCH, TWO_ENGINES = "search of settings", "two engines"


class OnTwoEngines(BaseModel, frozen=True, extra="forbid"):
    """The forecast of a point's load on two engines of its kind, which no run measures.

    With a link one of them prefills, and hands keys and values over it to the other, which decodes.
    Without one each does both, and a request goes to the one with fewer outstanding.
    """

    point: str
    link_gbit_per_s: float | None
    bands: dict[str, Band] = {}  # by metric


class PointForecasts(BaseModel, frozen=True, extra="forbid"):
    """The forecasts of every point, from vLLM's own scheduler run in virtual time."""

    points: dict[str, dict[str, Band]]  # point -> metric
    without: dict[str, str] = {}  # variant, point, SEARCH or TWO_ENGINES -> why it has no forecast
    trial_s: dict[str, float] = {}  # point -> from a trial's start to its last answer
    copied: dict[str, Band] = {}  # point that copies -> share of its guesses accepted in a trial
    # point at which chance decides how much is found in the prefix cache -> the fewest tokens that
    # any trial has found there after its first request, its second ..; not in older runs
    least_found: Annotated[dict[str, tuple[int, ...]], Field(exclude_if=lambda f: not f)] = {}
    step_times: list[dict[str, Any]] = []  # the stand-in steps, as they were timed
    # of this machine's speed, by earlier runs: both ends of all bands, and more at a curve's points
    machine_spread: float = 1.0
    # point whose load rises -> repeat -> which signals see it coming, in virtual time
    watches: Annotated[dict[str, tuple[Watch, ...]], Field(exclude_if=lambda w: not w)] = {}
    # point that a plot shows over time -> its first play, with the requests of the first repeat
    timelines: Annotated[dict[str, Timeline], Field(exclude_if=lambda t: not t)] = {}
    # point -> mean and peak share of the KV cache, each the mean over its plays at the timed step
    kv_use: Annotated[dict[str, KvUse], Field(exclude_if=lambda use: not use)] = {}
    # settings among which the best are looked for, beside those that are measured
    searched: Annotated[tuple[Searched, ...], Field(exclude_if=lambda points: not points)] = ()
    # point -> `mean` and `peak` with their bands; in runs from before that kept them, none
    kv_bands: Annotated[dict[str, dict[str, Band]], Field(exclude_if=lambda bands: not bands)] = {}
    on_two: Annotated[tuple[OnTwoEngines, ...], Field(exclude_if=lambda two: not two)] = ()
    # points at which more arrives than is served, so that TTFT grows with the length of the run
    growing: Annotated[tuple[str, ...], Field(exclude_if=lambda points: not points)] = ()

    @property
    def references(self) -> list[ReferenceStep]:
        """The reference steps that were timed in turn with the stand-in; none in older runs."""
        timed = (step.get("reference") for step in self.step_times)
        return [ReferenceStep.model_validate(each) for each in timed if each]

    def ratio(self, metric: str, pair: PairName, of_means: bool = False) -> Prediction | None:
        """Predict the ratio of two points by their forecasts; None where either has none, or 0.

        A measured ratio is one of geometric means over repeats, and so is this one. It is one of
        arithmetic means where that is asked for, and where either point has no geometric mean.
        """
        bands = [self.points.get(key, {}).get(metric) for key in (pair.treatment, pair.baseline)]
        above, below = (band and band.value for band in bands)
        if not above or not below:
            return None
        geometric = [band and band.geometric_mean for band in bands]
        if not of_means and all(geometric):
            above, below = (mean or math.nan for mean in geometric)
        return Prediction(
            value=above / below,
            formula="forecast of the treatment / forecast of the baseline",
            assumptions=(
                "vLLM's own scheduler in virtual time, over a step timed on this machine"
                " beforehand",
            ),
            source=OF_FORECASTS,
        )


class Predictions(BaseModel, frozen=True, extra="forbid"):
    """The predictions of a run, written before its first engine starts.

    `effects[claim][pair]` is the ratio of two points' forecasts where both have one;
    `closed_forms` then holds the lab's own formula beside it. `forecasts[name][point]` are closed
    forms, most of them bounds. `in_virtual_time` holds every point's forecast; it is None in runs
    before it was introduced, and where none could be made. `arithmetic` is what findings are held
    against, by what it is of: `memory, untiled at 4096`.
    """

    effects: dict[str, dict[str, Prediction]]
    closed_forms: dict[str, dict[str, Prediction]] = {}
    forecasts: dict[str, dict[str, Prediction]]
    in_virtual_time: PointForecasts | None = None
    acceptance: dict[str, float] = {}  # point that guesses -> share accepted, if not `copied`
    arithmetic: dict[str, Prediction] = {}

    def of_means(self, claim: Claim, treatment: str, baseline: str) -> Prediction | None:
        """Return what a ratio of arithmetic means is held against, where forecasts predict it."""
        pair = PairName(treatment, baseline)
        ratio = self.effects[claim.name][str(pair)]
        if ratio.source != OF_FORECASTS or not self.in_virtual_time:
            return None
        return self.in_virtual_time.ratio(claim.metric, pair, of_means=True)


class Discarded(BaseModel, frozen=True, extra="forbid"):
    """An attempt at a trial that was disturbed, so that the trial was measured again.

    Its requests are not kept, nor is any figure.
    """

    reasons: dict[str, str]  # name of a caveat -> its text
    loop_lag_max_s: float | None
    cpu_steal: float | None
    cpu_others: float | None
    cpu_engine: float | None
    took_s: float


class TrialResult(BaseModel, frozen=True, extra="forbid"):
    """The content of `trial.json`: what the records of the requests do not hold."""

    point: str
    repeat: int
    failed: str | None = None  # why; then everything else is null
    summary: TrialSummary | None = None
    engine: dict[str, Any] | None = None
    start: int | None = None  # of its variant's engine, from 1; None where all stayed loaded
    cpu_steal: FiniteFloat | None = None  # share of CPU time taken by other guests of the host
    cpu_others: FiniteFloat | None = None  # share taken by other processes of this host
    cpu_engine: FiniteFloat | None = None  # share used by the engine; None before it was recorded
    # of one core, used in the window by the busiest API server; None where that is not known
    server_core_share: Annotated[
        FiniteFloat | None, Field(exclude_if=lambda share: share is None)
    ] = None
    gpu_others: int | None = None  # processes of others on the GPUs; None where not known
    cpu_cores: int | None = None  # of this machine; None before it was recorded
    # the points whose requests took turns with this one's
    beside: Annotated[tuple[str, ...], Field(exclude_if=lambda points: not points)] = ()
    discarded: tuple[Discarded, ...] = ()  # the attempts before this one
    reference_before: ReferenceStep | None = None  # just before the load; None in older runs
    reference_after: ReferenceStep | None = None
    took_s: FiniteFloat = 0.0

    @property
    def timed(self) -> TimedTrial | None:
        """The reference steps beside this trial; None where they were not timed."""
        before, after = self.reference_before, self.reference_after
        if before is None or after is None or self.summary is None:
            return None
        return TimedTrial(self.point, self.summary.started_unix_s, before, after)

    @property
    def other_work(self) -> OtherWork:
        """Return what used the machine during the trial."""
        return OtherWork(
            self.cpu_steal,
            self.cpu_others,
            self.cpu_engine,
            self.gpu_others,
            self.cpu_cores,
            self.server_core_share,
        )


class Agreement(BaseModel, frozen=True, extra="forbid"):
    """One count over the trials of a session, from three sources; None where it is not known."""

    what: str
    records: int
    prometheus: int | None
    engine: int | None


class Summary(BaseModel, frozen=True, extra="forbid"):
    """Everything that a report says, computed from the trials."""

    measurements: dict[str, dict[int, dict[str, float | None]]]
    pooled: dict[str, dict[str, float]]  # point -> percentile over the samples of all repeats
    judgements: list[Judgement]
    forecasts: list[ForecastResult]
    in_virtual_time: list[ForecastAtPoint] = []
    # point -> mean and peak share of the KV cache, each the mean over repeats, if it was forecast
    kv_use: Annotated[dict[str, KvUse], Field(exclude_if=lambda use: not use)] = {}
    # point -> repeat -> metric -> request: by how much it moves the figure's logarithm, where
    # requests of several engines took turns
    influences: Annotated[
        dict[str, dict[int, dict[str, dict[int, float]]]], Field(exclude_if=lambda of: not of)
    ] = {}
    # what the lab computes beyond its claims, as plain JSON of its dataclass; its page says it
    facts: Annotated[dict[str, Any], Field(exclude_if=lambda facts: not facts)] = {}
    machine_speed: MachineSpeed | None = None  # by the reference steps; None in older runs
    caveats: list[Caveat]
    failed: dict[str, str]
    missing: int  # trials that were never played
    measured_again: dict[str, list[str]] = {}  # trial -> why, for each attempt that was discarded

    @model_validator(mode="before")
    @classmethod
    def _without_words(cls, fields: Any) -> Any:
        """Pass over the words that earlier files have: a lab's page has them now."""
        if not isinstance(fields, dict):
            return fields
        return {name: of for name, of in fields.items() if name not in ("findings", "answers")}

    def figure(self, point: str, metric: str) -> Interval | None:
        """Return a point's figure as the table of metrics wants it shown, or None without data."""
        return figure(self.measurements.get(point, {}), self.pooled.get(point, {}), metric)

    def value(self, point: str, metric: str) -> float | None:
        """Return a point's figure without its interval."""
        interval = self.figure(point, metric)
        return interval.value if interval else None

    def over_repeats(self, point: str, metric: str) -> Interval | None:
        """Compute the mean over a point's repeats with its interval, for percentiles too."""
        return over_repeats(self.measurements.get(point, {}), metric)


class Undecided(BaseModel, frozen=True, extra="forbid"):
    """Names the points of claims that were undecided after the lab's own repeats."""

    points: tuple[str, ...]
    # no time was left for more repeats, whatever the figures said, so the lab looked only once
    once: Annotated[bool, Field(exclude_if=lambda once: not once)] = False


class Residency(BaseModel, frozen=True, extra="forbid"):
    """Records how the engines of a run shared one GPU, or why they took turns after all.

    The machine's own speed was timed before any of them was loaded, and with all of them loaded and
    idle.
    """

    shares: dict[str, FiniteFloat]  # of the GPU's memory, by variant: --gpu-memory-utilization
    alone: tuple[ReferenceStep, ...] = ()
    beside: tuple[ReferenceStep, ...] = ()  # none where not all of them started
    in_turn: str = ""  # why they took turns; empty where they stayed loaded together


class Session(BaseModel, frozen=True, extra="forbid"):
    """Records how one session of a run went: its times, and whether the counts agreed."""

    engine_start_s: FiniteFloat
    load_s: FiniteFloat
    wall_s: FiniteFloat
    resident: bool
    there_and_back: bool = False  # where not resident: in turns A B C, then C B A, and so on
    idle_suspended: bool = False  # each engine while only others were measured; never in older runs
    # on its core the load generator goes before what of an engine runs there; not in older runs
    client_first: bool = False
    agreement: list[Agreement]
    prometheus: str | None  # why there was no Prometheus; None where there was one
    ended_at: str | None = None


class RunFolder:
    """Reads and writes the files of one run; a reader raises DamagedError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._manifest: tuple[object, Run] | None = None  # with the state of the file that it was
        self._kept = packed.Kept()  # records of a run that is not packed

    @classmethod
    def create(cls, run: Run) -> RunFolder:
        """Create the folder of a new run under `RESULTS`, with its manifest."""
        folder = cls(RESULTS / run.machine.slug / run.lab["name"] / run.run_id)
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
    def _packed(self) -> PackedRun | None:
        """The reader of its packed files; None while it is not packed."""
        return packed.opened(self.path)

    def run(self) -> Run:
        """Read the manifest: once, unless its file changes. Raises DamagedError."""
        path = self.path / "run.json"
        state = bounded.state(path)
        if not self._manifest or self._manifest[0] != state:
            bounded.require_own_files(self.path)
            self._manifest = state, read_json(path, Run)
        return self._manifest[1]

    @property
    def _usd_per_hour(self) -> float | None:
        """The price of the machine; None where none was given, and in trials without a manifest."""
        return self.run().usd_per_hour if (self.path / "run.json").exists() else None

    def predictions(self) -> Predictions:
        """Read what was predicted before the first engine started."""
        name = packed.PREDICTIONS if self._packed else "predictions.json"
        return read_json(self.path / name, Predictions)

    def summary(self) -> Summary:
        """Read what was computed from the trials."""
        name = packed.SUMMARY if self._packed else "summary.json"
        return read_json(self.path / name, Summary)

    @property
    def is_packed(self) -> bool:
        """Whether its trials are in its packed files."""
        return self._packed is not None

    @property
    def is_predicted(self) -> bool:
        """Whether its predictions are on file."""
        return self.is_packed or (self.path / "predictions.json").exists()

    @property
    def is_summarised(self) -> bool:
        """Whether its summary is on file."""
        return self.is_packed or (self.path / "summary.json").exists()

    def undecided(self) -> Undecided | None:
        """Read which points were chosen for more repeats; None where none has been."""
        path = self.path / "undecided.json"
        return read_json(path, Undecided) if path.exists() else None

    def session(self) -> Session | None:
        """Read how the last session went, if one ended."""
        path = self.path / "session.json"
        return read_json(path, Session) if path.exists() else None

    @property
    def residency_file(self) -> Path:
        """Return the path of how engines shared a GPU."""
        return self.path / "residency.json"

    def residency(self) -> Residency | None:
        """Read how engines shared a GPU; None where they were never to."""
        path = self.residency_file
        return read_json(path, Residency) if path.exists() else None

    def probe_file(self, probe: str, variant: str) -> Path:
        """Return the path of a probe's result on a variant's engine."""
        return self.path / "probes" / f"{probe}-{variant}.json.gz"

    @property
    def attention_file(self) -> Path:
        """Return the path of how long attention took by itself."""
        return self.path / "probes" / "attention.json.gz"

    def probe_results(self) -> dict[str, Any]:
        """Read what each probe found, by the probe's name with its variant's behind it."""
        if self._packed:
            return dict(self._packed.probes)
        files = sorted((self.path / "probes").glob("*.json.gz"))
        return {path.name.removesuffix(".json.gz"): bounded.parsed(path) for path in files}

    def _probe(self, name: str) -> Any:
        if self._packed:
            return self._packed.probes.get(name)
        path = self.path / "probes" / f"{name}.json.gz"
        return bounded.parsed(path) if path.exists() else None

    def attention_times(self) -> AttentionTimes | None:
        """Read how long attention took by itself; None where it was not timed."""
        found = self._probe("attention")
        try:
            return None if found is None else AttentionTimes.model_validate(found)
        except ValidationError as error:
            raise DamagedError(f"{self.attention_file}{_first_error(error)}") from error

    def probe_result(self, probe: str, variant: str) -> dict[str, Any] | None:
        """Read the result of a probe, or of its quick form, on a variant's engine, if any."""
        for name in (probe, f"{probe}-quick"):
            if found := self._probe(f"{name}-{variant}"):
                result: dict[str, Any] = found
                return result
        return None

    def trial_folder(self, point: Point, repeat: int) -> Path:
        """Return the path of a trial's folder, which is there until the run is packed."""
        return self._trial_folder(point.key, repeat)

    def _trial_folder(self, point: str, repeat: int) -> Path:
        return self.path / "trials" / point / str(repeat)

    def trial_result(self, point: Point, repeat: int) -> TrialResult | None:
        """Read what is known of a trial beside its requests, if the trial ended."""
        if self._packed:
            line = self._packed.trials.get(str(TrialName(point.key, repeat)))
            return None if line is None else _read(self.path / packed.TRIALS, line, TrialResult)
        path = self.trial_folder(point, repeat) / "trial.json"
        return read_json(path, TrialResult) if path.exists() else None

    def has_records(self, point: str, repeat: int) -> bool:
        """Whether requests of a trial are on file; a trial that failed may have none."""
        if self._packed:
            return self._packed.has_records(str(TrialName(point, repeat)))
        return (self._trial_folder(point, repeat) / "requests.jsonl.gz").exists()

    def records(self, point: str, repeat: int) -> list[RequestRecord]:
        """Read the records of a trial's requests. Raises DamagedError where there are none."""
        if self._packed:
            return self._packed.records(str(TrialName(point, repeat)))
        path = self._trial_folder(point, repeat) / "requests.jsonl.gz"
        version = path, bounded.state(path)
        if (kept := self._kept.get(version)) is not None:
            return kept
        bounded.unpacked_bytes(path)
        try:
            found = records.read_all(path)
        except ValueError as error:
            raise DamagedError(str(error)) from error
        self._kept.put(version, found)
        return found

    def series(self, point: str, repeat: int) -> list[Kept]:
        """Read what was kept of the engine in a trial; [] where nothing was."""
        if self._packed:
            found = self._packed.series(str(TrialName(point, repeat)))
            return engine_series.of_plain(found, self.path / packed.SERIES)
        return engine_series.read(self._trial_folder(point, repeat))

    def telemetry(self, point: str, repeat: int) -> list[telemetry.Sample]:
        """Read what was sampled of the hardware in a trial; [] where nothing was."""
        if self._packed:
            return self._packed.telemetry(str(TrialName(point, repeat)))
        path = self._trial_folder(point, repeat) / "telemetry.csv.gz"
        try:
            if path.exists():
                bounded.unpacked_bytes(path, bounded.MOST_PARSED_BYTES)
            return telemetry.read(path)
        except ValueError as error:
            raise DamagedError(str(error)) from error

    def starts_on_file(self, points: Sequence[Point], lab: Lab) -> dict[str, int]:
        """Read the last start of each variant's engine that a trial was played on."""
        last: dict[str, int] = {}
        for result in self.trial_results(points, lab):
            variant = PointName.parse(result.point).variant
            last[variant] = max(last.get(variant, 0), result.start or 0)
        return last

    def played_s(self, points: Sequence[Point], lab: Lab) -> float:
        """Return how long the trials on file took, in seconds, without engine starts.

        What was discarded of them is in it.
        """
        return sum(
            result.took_s + sum(attempt.took_s for attempt in result.discarded)
            for result in self.trial_results(points, lab)
        )

    def took_turns(self, points: Sequence[Point], lab: Lab) -> bool | None:
        """Tell whether engines took turns in the trials that succeeded.

        Where none has, they do if it was found that they cannot share the GPU; else None.
        """
        starts = [r.start for r in self.trial_results(points, lab) if r.failed is None]
        if starts:
            return any(start is not None for start in starts)
        residency = self.residency()
        return True if residency and residency.in_turn else None

    def transports_s(
        self, points: Sequence[Point], lab: Lab, expected: Expected
    ) -> dict[str, dict[tuple[str, int], float]]:
        """Measure how long transport takes in each undisturbed trial at one stream, by variant.

        Each is named by its point and repeat. Raises DamagedError.
        """
        found: dict[str, dict[tuple[str, int], float]] = {}
        for point in filter(is_one_stream, points):
            for repeat in range(1, lab.rounds + 1):
                result = self.trial_result(point, repeat)
                trial = None if result is None else self.trial(point, result, lab)
                if trial and result:
                    took_s = undisturbed_transport_s(trial, result.timed, expected)
                    if took_s is not None:
                        found.setdefault(point.variant.name, {})[point.key, repeat] = took_s
                del trial  # before the next one is read
        return found

    def trial_results(self, points: Sequence[Point], lab: Lab) -> list[TrialResult]:
        """Read the own files of all trials that ended."""
        trials = ((point, r) for point in points for r in range(1, lab.rounds + 1))
        return [result for trial in trials if (result := self.trial_result(*trial)) is not None]

    def sampling(self, points: Sequence[Point], lab: Lab) -> Sampling:
        """Read how the repeats came about: the looks, and which trials were played together.

        Where engines took turns, the starts are in it.
        """
        session, starts = self.session(), dict[str, dict[int, int]]()
        beside = dict[str, dict[int, tuple[str, ...]]]()
        for result in self.trial_results(points, lab):
            start = result.start
            if result.beside:
                beside.setdefault(result.point, {})[result.repeat] = result.beside
            if start is None and session is not None and not session.resident:
                # a run from before trials recorded their start
                start = 1 + (session.there_and_back and result.repeat > lab.repeats // 2)
            if start is not None:
                starts.setdefault(result.point, {})[result.repeat] = start
        undecided = self.undecided()
        looks = 1 if undecided and undecided.once else lab.looks
        return Sampling(looks=looks, starts=starts, beside=beside)

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
            self._usd_per_hour,
            result.beside,
        )


def run_id(digest: str) -> str:
    """Name a run that starts now: UTC time and digest."""
    return f"{moment()}-{digest}"


def moment() -> str:
    """Write the UTC time of now as names of files and folders hold it."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}"


def snapshot_json(snapshot: Snapshot) -> dict[str, Any]:
    """Convert the engine metrics that the lab knows by name to plain JSON."""
    return {
        "values": {n: v for n, v in snapshot.values.items() if metrics.is_known(n)},
        "histograms": {
            n: {**asdict(h), "le": [str(b) for b in h.le]}
            for n, h in snapshot.histograms.items()
            if n in metrics.HISTOGRAMS
        },
        "info": snapshot.info,
    }


def snapshot_from_json(plain: dict[str, Any]) -> Snapshot:
    """Read the engine metrics back that `snapshot_json` wrote.

    Raises ValueError, KeyError, TypeError or AttributeError where it wrote something else.
    """
    snapshot = Snapshot(
        {name: float(value) for name, value in plain["values"].items()},
        {
            name: Histogram(
                tuple(map(float, h["le"])),
                tuple(map(float, h["counts"])),
                float(h["sum"]),
                float(h["count"]),
            )
            for name, h in plain["histograms"].items()
        },
        {name: {**labels} for name, labels in plain["info"].items()},
    )
    return metrics.within(snapshot, -metrics.MOST)  # a counter of an engine that began anew fell


def write_json(path: Path, model: BaseModel) -> None:
    """Write a model as JSON; the file appears only when it is whole."""
    whole.write(path, json.dumps(model.model_dump(mode="json"), indent=1) + "\n")


def write_packed_json(path: Path, model: BaseModel) -> None:
    """Write a model as JSON, packed by xz; the file appears only when it is whole."""
    whole.write(path, lzma.compress(model.model_dump_json().encode() + b"\n"))


def write_gzip(path: Path, plain: Any) -> None:
    """Write plain data as gzipped JSON; the file appears only when it is whole."""
    packed = gzip.compress(orjson.dumps(plain, option=orjson.OPT_NON_STR_KEYS), mtime=0)
    whole.write(path, packed)


def read_json(path: Path, kind: type[M]) -> M:
    """Read a model from JSON; raises DamagedError, which names the file and the field."""
    packed_file = path.suffix == ".xz"
    return _read(path, bounded.unpacked_json(path) if packed_file else bounded.text(path), kind)


def _read(path: Path, content: str | bytes, kind: type[M]) -> M:
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        raise DamagedError(f"{path}{_first_error(error)}") from error


def _first_error(error: ValidationError) -> str:
    first = error.errors()[0]
    place = f", {'.'.join(map(str, first['loc']))}" if first["loc"] else ""
    return f"{place}: {first['msg']}"


def require_room(path: Path) -> None:
    """Make the folder; raises LabError where a run's files cannot be written or might not fit."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise LabError(
            f"RESULTS={path} cannot be written ({error.strerror}): name another folder"
        ) from error
    free_bytes = shutil.disk_usage(path).free
    if free_bytes < LEAST_FREE_BYTES:
        raise LabError(
            f"{free_bytes / 2**20:.0f} MiB are free under {path}, and a run needs"
            f" {LEAST_FREE_BYTES / 2**20:.0f} MiB: free some disk space, and run again"
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
    """Open the run in a folder.

    The path is taken from the working directory or from the checkout; raises LabError where neither
    holds a run.
    """
    folder = next((p for p in (path, ROOT / path) if (p / "run.json").exists()), None)
    if folder is None:
        raise LabError(
            f"{path} is not a run: give a folder with run.json, results/<machine>/<lab>/<run>"
        )
    return RunFolder(folder.resolve())  # names of machine, lab and run come from the whole path
