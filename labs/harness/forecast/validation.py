"""Hold forecasts against runs that others have published, request by request.

A set of published runs is a folder with `runs.toml`, which says of each run what was served, on
what and where the figures come from, and a CSV of every request beside it: `arrival_s`,
`prompt_tokens`, `output_tokens`, `ttft_s`, `e2e_s`, and `prompt_id` where a prompt was sent more
than once. The lab's own `runs.toml` (`serving/simulator/public_runs/`) describes runs whose
requests it does not hold. vLLM's scheduler plays the arrivals in virtual time over the step of the
card; nothing is fitted to what is judged.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import tempfile
import tomllib
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, Field, FiniteFloat, ValidationError

from labs.harness.analysis.computed import Band
from labs.harness.forecast.forecaster import Forecaster, ForecastError, play_all
from labs.harness.forecast.simulated_trials import as_one_gpu, records
from labs.harness.plan.progress import ProgressDisplay
from labs.harness.spec.lab import LabError
from labs.harness.storage.published_gpu import FIGURES, Judged, PublishedRun, Stage
from serving.engines.vllm import Vllm
from serving.hardware.gpus import DATASHEETS, short_names
from serving.models import catalog, dummy
from serving.simulator import cards
from serving.simulator.protocol import (
    ForecastPlan,
    ForecastPlay,
    PlannedEngine,
    PlannedTrial,
    SyntheticRequest,
)
from serving.simulator.traffic import Traffic

PUBLIC_RUNS = Path(cards.__file__).parent / "public_runs"
MOST_REQUESTS = 1000  # of a run that are played, its first
Figures = Mapping[str, float]  # of a run, by a name of FIGURES


class Request(BaseModel, frozen=True):
    """A request that was sent."""

    arrival_s: FiniteFloat = Field(ge=0)
    prompt_tokens: int = Field(ge=1)
    output_tokens: int = Field(ge=1)
    prompt_id: str = ""


class MeasuredRequest(Request, frozen=True):
    """A request of which it was published what its client saw."""

    ttft_s: FiniteFloat = Field(gt=0)
    e2e_s: FiniteFloat = Field(gt=0)


def drawn(stage: Stage) -> list[Request]:
    """Draw the requests of a stage, with Poisson arrivals; what was measured is not in them.

    Its measured rate is the nominal one, so what is drawn is stretched to have it exactly.
    """
    gaps_s = np.random.default_rng(0).exponential(size=MOST_REQUESTS)
    gaps_s /= gaps_s.mean() * stage.rate_per_s
    return [
        Request(
            arrival_s=arrival_s,
            prompt_tokens=stage.prompt_tokens,
            output_tokens=stage.output_tokens,
            prompt_id=str(index % stage.texts),
        )
        for index, arrival_s in enumerate(np.cumsum(gaps_s).tolist())
    ]


def figures(
    ttft_s: Sequence[float], e2e_s: Sequence[float], tokens: Sequence[int]
) -> dict[str, float]:
    """Compute what is compared, by the same formulas for what was measured and what was played.

    TPOT is a request's time behind its first token over the tokens behind it.
    """
    ttft, e2e, n = (np.array(values, dtype=float) for values in (ttft_s, e2e_s, tokens))
    tpot = (e2e - ttft)[n > 1] / (n[n > 1] - 1)
    values = (
        ttft.mean(), np.percentile(ttft, 50), np.percentile(ttft, 99), tpot.mean(), e2e.mean(),
        np.percentile(e2e, 99),
    )  # fmt: skip
    return dict(zip(FIGURES, map(float, values), strict=True))


def runs_of(data: Path) -> list[tuple[PublishedRun, Path, Path]]:
    """Find the described runs whose requests lie in a folder, or the one whose file is named.

    Returns each with its requests' file and the folder of its description. Raises LabError.
    """
    folder = data if data.is_dir() else data.parent
    described = folder if (folder / "runs.toml").exists() else PUBLIC_RUNS
    runs = _described(described / "runs.toml")
    found = [(run, folder / run.requests, described) for run in runs]
    for run, file, _ in found:
        if described == data and not run.stage and not file.is_file():
            raise LabError(f"{described / 'runs.toml'}, {run.name}: requests: there is no {file}")
    wanted = [f for f in found if f[1].is_file() and (data.is_dir() or f[1] == data)]
    if wanted and data.is_dir():
        wanted += [f for f in found if f[0].stage]
    if not wanted:
        names = ", ".join(run.requests for run in runs if run.requests)
        raise LabError(
            f"DATA={data} has no requests of a described run: describe yours in a runs.toml beside"
            f" them ({PUBLIC_RUNS / 'runs.toml'} is an example), or give one of {names}"
        )
    return wanted


def _described(path: Path) -> list[PublishedRun]:
    """Read the descriptions of runs. Raises LabError."""
    try:
        listed = tomllib.loads(path.read_text()).get("run")
    except (OSError, ValueError) as error:
        raise LabError(f"{path} cannot be read: {error}") from error
    if not isinstance(listed, list):
        raise LabError(f"{path} has no [[run]]")
    runs = list[PublishedRun]()
    for place, run in enumerate(listed, 1):
        try:
            runs.append(PublishedRun.model_validate(run))
        except ValidationError as error:
            name = run.get("name", place) if isinstance(run, dict) else place
            raise LabError(f"{path}, run {name}: {_first(error)}") from error
        if runs[-1].name in {earlier.name for earlier in runs[:-1]}:
            raise LabError(f"{path}, run {place}: name: there is another {runs[-1].name}")
    return runs


def _first(error: ValidationError) -> str:
    """Say in a sentence what is wrong with the first field that is."""
    first = error.errors()[0]
    said = first["msg"].removeprefix("Value error, ")
    return ": ".join([".".join(map(str, first["loc"])), said]).removeprefix(": ")


def read_requests(path: Path) -> list[MeasuredRequest]:
    """Read the first requests of a run, in the order of their arrivals, from its first one on.

    The clock of a file may be any: that of the day, or of a benchmark that was warm before.
    Raises LabError.
    """
    try:
        content = path.read_bytes()
        text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode()
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise LabError(f"{path} cannot be read: {error}") from error
    rows, requests = csv.DictReader(text.splitlines()), list[MeasuredRequest]()
    for row in rows:
        try:
            requests.append(MeasuredRequest.model_validate(row))
        except ValidationError as error:
            raise LabError(f"{path}, line {rows.line_num}: {_first(error)}") from error
    if not requests:
        raise LabError(f"{path} has no requests")
    played = sorted(requests, key=lambda request: request.arrival_s)[:MOST_REQUESTS]
    if all(request.output_tokens == 1 for request in played):
        raise LabError(f"{path}: output_tokens: none is above 1, so there is no TPOT")
    first_s = played[0].arrival_s
    return [
        request.model_copy(update={"arrival_s": request.arrival_s - first_s}) for request in played
    ]


@dataclass(frozen=True)
class _Case:
    """A published run with what was sent in it and what was measured."""

    run: PublishedRun
    described: Path  # the folder of its description
    requests: Sequence[Request]
    measured: Mapping[str, float]
    sha256: str

    @classmethod
    def of(cls, run: PublishedRun, path: Path, described: Path) -> _Case:
        """Read the requests of a run, or draw those of a stage. Raises LabError."""
        if run.stage:
            return cls(run, described, drawn(run.stage), run.stage.measured, sha256="")
        requests = read_requests(path)
        if run.warm and not all(request.prompt_id for request in requests):
            raise LabError(f"{path}: {run.name} is warm, so each request needs a prompt_id")
        measured = figures(
            [request.ttft_s for request in requests],
            [request.e2e_s for request in requests],
            [request.output_tokens for request in requests],
        )
        return cls(
            run, described, requests, measured, hashlib.sha256(path.read_bytes()).hexdigest()
        )

    def judged(self, expected: Figures, faster: Figures, slower: Figures) -> Judged:
        """Put the figures of three plays beside what was measured."""
        run, requests = self.run, self.requests
        rate_per_s = (
            run.stage.rate_per_s  # to which they were stretched
            if run.stage
            else (len(requests) - 1) / max(requests[-1].arrival_s, 1e-9)
        )
        bands = {
            name: Band(
                value=expected[name],
                low=min(faster[name], slower[name]),
                high=max(faster[name], slower[name]),
            )
            for name in self.measured
        }
        return Judged(
            run=run,
            sha256=self.sha256,
            sent=len(requests),
            rate_per_s=rate_per_s,
            in_flight=rate_per_s * self.measured["e2e_mean_s"],
            measured=self.measured,
            forecast=bands,
        )


def judge(
    data: Path, forecasters: Sequence[Forecaster], progress: ProgressDisplay
) -> tuple[list[Judged], dict[str, str]]:
    """Forecast every described run whose requests are there; put each beside what was measured.

    Returns these, and why others could not be simulated, by the run's name. Raises LabError for
    runs that cannot be read, and where vLLM does not import.
    """
    cases = [_Case.of(*found) for found in runs_of(data)]
    played: dict[int, Figures] = {}  # by the number of a plan, of which each case has three
    failed: dict[int, ForecastError] = {}
    with tempfile.TemporaryDirectory(prefix="labs-judge-") as work:
        plans: list[ForecastPlan] = []
        for number, case in enumerate(cases):
            plans += _plans(case, Path(work) / f"{number}.jsonl")
        for number, play in play_all(forecasters, plans, failed):
            try:
                played[number] = _seen(play)
            except ForecastError as error:
                failed[number] = error
            progress.waiting(f"playing published runs: {len(played)} of {len(plans)} plays done")
    judged, without = list[Judged](), dict[str, str]()
    for first, case in zip(range(0, len(plans), 3), cases, strict=True):
        numbers = range(first, first + 3)
        why = next((str(failed[number]) for number in numbers if number in failed), "")
        if why:
            without[case.run.name] = why
        else:
            judged.append(case.judged(*(played[number] for number in numbers)))
    return judged, without


def _seen(play: ForecastPlay) -> Figures:
    """Compute what the clients of a play saw. Raises ForecastError where they saw no answer."""
    ttft_s, e2e_s, tokens = [], [], []
    for record in records(play.play):
        if record.ttft_s is not None and record.e2e_s is not None:
            ttft_s.append(record.ttft_s)
            e2e_s.append(record.e2e_s)
            tokens.append(record.output_tokens or 0)
    if max(tokens, default=0) < 2:
        raise ForecastError("no request was answered with more than a token")
    return figures(ttft_s, e2e_s, tokens)


def _plans(case: _Case, file: Path) -> list[ForecastPlan]:
    """Plan the run as expected, on a faster and on a slower engine. Raises LabError.

    What is sent is written to `file`.
    """
    run, requests = case.run, case.requests
    folder = _model_folder(run, case.described, file.with_suffix(".model"))
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    try:
        shape = catalog.shape_of(config)
    except KeyError as error:
        own = case.described / f"{run.model}.json"
        raise LabError(f"{own}: {error.args[0]}: the field is missing") from error
    card = next((c for c in DATASHEETS.values() if c.short_name == run.card), None)
    if card is None:
        known = ", ".join(short_names())
        raise LabError(f"{run.name}: there is no card {run.card!r}; known are {known}")
    documents: dict[str, int] = {}  # by a prompt's id: which request is the first with it
    with file.open("w") as lines:
        for index, request in enumerate(requests):
            synthetic = SyntheticRequest(
                index=index,
                prompt_tokens=request.prompt_tokens,
                output_tokens=request.output_tokens,
                document=documents.setdefault(request.prompt_id, index),
                document_tokens=request.prompt_tokens if request.prompt_id else 0,
            )
            lines.write(synthetic.model_dump_json() + "\n")
    longest = max(request.prompt_tokens + request.output_tokens for request in requests)
    kv_bytes = shape.kv_bytes_per_token() * run.block_tokens * run.kv_blocks
    flags = as_one_gpu(
        {
            "block-size": run.block_tokens,
            "kv-cache-memory-bytes": int(kv_bytes) // run.gpus,
            "max-model-len": longest + 1,
            "tensor-parallel-size": run.gpus,
            **run.flags,
        }
    )
    trial = PlannedTrial(
        key=run.name,
        repeat=1,
        requests=file,
        traffic=Traffic(
            kind="open",
            schedule_s=tuple(request.arrival_s for request in requests),
            most_in_flight=run.most_in_flight,
            warmup_s=0,
            window_s=requests[-1].arrival_s + 1,
        ),
        ends_only=True,
        # of a stage's thousands of requests next to none is the first with its text
        primed=1 + max(documents.values()) if run.stage or run.warm else 0,
    )
    argv = (*Vllm.model_argv(folder), "--load-format", "dummy", *Vllm.flag_argv(flags))
    return [
        ForecastPlan(
            delays=cards.DELAYS,
            engines=(PlannedEngine(argv=argv, step_times=step, trials=(trial,), on_cuda=True),),
        )
        for step in cards.steps(config, shape, card, run.gpus)
    ]


def _model_folder(run: PublishedRun, described: Path, place: Path) -> Path:
    """Make the folder of a model without weights: a config is all that a forecast needs."""
    own = described / f"{run.model}.json"
    if not own.exists() and run.model not in dummy.SHAPES:
        raise LabError(f"{run.name}: neither {own} exists nor a shape {run.model!r} in the lab")
    place.mkdir()
    try:
        config = json.loads(own.read_text()) if own.exists() else dummy.config_of(run.model)
    except ValueError as error:
        raise LabError(f"{own} cannot be read: {error}") from error
    (place / "config.json").write_text(json.dumps(config))
    return place
