"""What a run records: its manifest, its trials, how its sessions went.

Every model is strict: a field that today's code does not know is an error.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    Field,
    FiniteFloat,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from labs.harness.analysis.checks.expected import Expected, Served
from labs.harness.analysis.computed import PointForecasts, Predictions
from labs.harness.analysis.machine_speed import TimedTrial
from labs.harness.analysis.measure import OtherWork
from labs.harness.spec.lab import NOT_FILED, Lab, Point, Prediction, knobs
from labs.harness.storage.bounded import DamagedError, first_error
from loadtests.plan import TrialSummary
from loadtests.workload import Name
from serving import metrics
from serving.hardware.machine import Ceilings, Environment, Machine
from serving.hardware.reference_step import ReferenceStep
from serving.metrics import Histogram, Snapshot
from serving.models.catalog import Shape

FORMAT_VERSION = 2  # 1 hashed whole files of requests, and not only what is sent


def _shape(sizes: dict[str, int]) -> dict[str, int]:
    try:
        Shape(**sizes)
    except TypeError as error:
        raise ValueError("no shape of a model") from error
    return sizes


Sizes = Annotated[
    dict[str, Annotated[int, Field(ge=0, le=10**16)]], AfterValidator(_shape)
]  # of a Shape  # of a Shape
_NAME: TypeAdapter[str] = TypeAdapter(Name)


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
        raise DamagedError(f"its lab{first_error(error)}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"its lab cannot be read: {error!r}") from error


def fresh_knobs(resolved: Mapping[str, Any]) -> dict[str, Any]:
    """Read a resolved lab's settings with today's code: a field added since has its default."""
    return knobs(lab_from_resolved(resolved).resolved())


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


class Undecided(BaseModel, frozen=True, extra="forbid"):
    """Names the points of claims that were undecided after the lab's own repeats."""

    points: tuple[str, ...]
    # no time was left for more repeats, whatever the figures said, so the lab looked only once
    once: Annotated[bool, Field(exclude_if=lambda once: not once)] = False


class Agreement(BaseModel, frozen=True, extra="forbid"):
    """One count over the trials of a session, from three sources; None where it is not known."""

    what: str
    records: int
    prometheus: int | None
    engine: int | None


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

    @property
    def load_min(self) -> float:
        return self.load_s / 60


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
