"""Plan the serving of a model on machines that are not here: does it fit, how many, at what price?

A model's memory is arithmetic. Everything about time is a forecast: vLLM's own scheduler in virtual
time, over steps from a datasheet and published efficiencies (`serving/simulator/`), or over one
that a run on file timed (`machines_on_file.py`). Nothing here is measured, and nothing is recorded.
"""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

from labs.harness.analysis.computed import Band
from labs.harness.forecast.capacity_figures import Alone, Assumed, CapacityPlan, Demand, Fit, Price
from labs.harness.forecast.forecaster import Forecaster, side_by_side
from labs.harness.forecast.load_forecast import LoadForecast, over
from labs.harness.forecast.simulated_loads import forecast_loads, processes
from labs.harness.forecast.simulated_trials import as_one_gpu, defaults_on_a_gpu
from labs.harness.forecast.step_timing import ends_of_band
from labs.harness.plan.progress import ProgressDisplay
from labs.harness.plan.recorded_machines import DEFAULT_BUDGET_TOKENS, MachineOnFile
from labs.harness.plan.resolve import machine_of
from labs.harness.spec import theory
from labs.harness.spec.lab import SLO, LabError
from loadtests.arrivals import Poisson
from serving.engines.flags import FlagValue
from serving.engines.vllm import CPU_KV_BYTES, PROCESS_BYTES, Vllm, usable_bytes
from serving.engines.vllm_flags import VllmFlags
from serving.hardware.gpus import Datasheet
from serving.hardware.machine import Machine
from serving.models import catalog, dummy
from serving.models.catalog import Model, ModelError, Shape
from serving.simulator import cards
from serving.simulator.datasheet import reason_against_sharing
from serving.simulator.fleet import Routing
from serving.simulator.protocol import ForecastPlan, PlannedEngine, PlannedTrial, SyntheticRequest
from serving.simulator.step import Piece, Step, StepTimes
from serving.simulator.traffic import Delays, Traffic

PRECISIONS = ("bf16", "fp8", "w8a8", "w4a16-gptq")
DEFAULT_SHAPE = "llama-8b"
SHARE = 0.95  # of the requests must meet the objective
GRIDS = ((0.4, 0.6, 0.75, 0.9, 1.05, 1.25), (1.5, 1.9, 2.4, 3.0))
"""Rates tried, in units of the closed form's estimate; the second where a faster step serves all of
the first."""
FEWEST = 500  # requests that count in a play
MOST_REPLICAS = 64
LONGEST_OUTPUT = 4  # drawn outputs are cut at so many times their mean
Name = TypeVar("Name")  # of a load: its rate, or its router


@dataclass(frozen=True)
class Question:
    """Holds what a reader wants to serve: a model, on a GPU, for a demand, within an objective.

    The GPU is one with a datasheet, or a machine on file.
    """

    model: Model
    precision: str
    card: str
    demand: Demand
    slo: SLO
    gpus: int = 1  # that share each layer of a replica
    replicas: int | None = None  # None: as many as the demand needs
    routers: tuple[str, ...] = ()
    in_flight: int | None = None  # requests of each replica at most, as its clients limit them
    kv_blocks: int | None = None  # of each replica; None: what the weights leave of the memory
    usd_per_hour: float | None = None
    api_usd_per_million: float | None = None
    on_file: MachineOnFile | None = None  # in the place of the GPU


def model_named(machine: Machine, name: str) -> Model:
    """Find a shape that ships with the lab, a `config.json`, or the model in a folder.

    Raises ModelError.
    """
    name = name or DEFAULT_SHAPE
    given = Path(name)
    if catalog.is_quantized(given.parent if given.is_file() else given):
        raise ModelError(
            f"MODEL={name} holds quantized weights: give the model before quantization, and"
            " PRECISION= for how it is to be served"
        )
    found = catalog.resolve if catalog.has_weights(given) else dummy.resolve
    return found(machine, name)


def model_on_file(on_file: MachineOnFile, name: str) -> Model:
    """Find the model whose step was timed on a machine; raises ModelError."""
    found = dummy.resolve if on_file.dummy else catalog.resolve
    model = found(on_file.machine, name or on_file.model)
    return catalog.as_served(model, on_file.shape.value_bytes)


def plan(question: Question, progress: ProgressDisplay) -> CapacityPlan:
    """Answer a question about capacity. Raises LabError where a setting is impossible."""
    on_file = question.on_file and question.on_file.covering(DEFAULT_BUDGET_TOKENS)
    if on_file:
        machine = on_file.machine
        served, fits = _on_file(question, on_file)
    else:
        machine, sheet = machine_of(question.card)
        if sheet is None:
            raise LabError("a plan is made for a machine that is not here: name one with MACHINE=")
        if why := reason_against_sharing(question.model.shape, sheet, question.gpus):
            raise LabError(f"TP={question.gpus}: {why}")
        served = Served.of(question.model, question.precision, machine, sheet, question.gpus)
        fits = tuple(_fits(question, machine, sheet))
    answer = CapacityPlan(
        model=question.model.name.removesuffix(dummy.SUFFIX),
        card=machine.model if machine.kind == "gpu" else machine.describe(),
        on_cpu=machine.kind == "cpu",
        run=on_file.run if on_file else "",
        by_kernels=served.steps[0].attention is not None,
        precision=question.precision,
        gpus=question.gpus,
        demand=question.demand,
        slo=question.slo,
        share=SHARE,
        fits=fits,
    )
    if served.room_tokens < question.demand.tokens:
        return answer if on_file else replace(answer, enough_gpus=_enough_gpus(question))
    served = served.with_blocks(question.kv_blocks)
    longest = max((prompt + output for _, prompt, output in question.demand.trace), default=0)
    if (longest := max(longest, math.ceil(question.demand.tokens))) > served.most_tokens:
        raise LabError(
            f"the longest request has {longest:,} tokens, and {answer.model} so served takes"
            f" {served.most_tokens:,} at most: shorten LENGTHS or the TRACE, or choose another"
            " MACHINE or MODEL"
        )
    answer = replace(
        answer,
        alone=_request_alone(served, question.demand),
        assumed=Assumed(
            int(served.room_tokens) // served.flags.block_size,
            served.flags.block_size,
            served.flags.max_num_seqs,
            question.in_flight,
        ),
    )
    if not Vllm.is_installed():  # whose scheduler plays the rest
        return answer
    with (
        side_by_side(processes(len(question.demand.trace))) as forecasters,
        TemporaryDirectory(prefix="lab-plan-") as folder,
    ):
        player = _Player(served, question, forecasters, progress, Path(folder))
        rates = _rates(player)
        answer = replace(answer, rates=rates, capacity_per_s=_capacity(rates))
        needed = _needed(answer, question)
        if needed and question.routers and question.demand.rate_per_s:
            answer = replace(answer, replicas=needed, fleets=_fleets(player, needed))
    return replace(answer, price=_price(question, answer))


# ------------------------------------------------------------------------------------- arithmetic


@dataclass(frozen=True)
class Served:
    """Holds a model as one replica serves it, on a machine or on GPUs that share each layer."""

    model: Model
    flags: VllmFlags
    steps: tuple[StepTimes, ...]  # at each of ENDS
    bandwidth_bytes_per_s: float  # of the memory: the datasheet's, or as it was measured
    on_cuda: bool = True
    delays: Delays = cards.DELAYS

    @classmethod
    def of(
        cls, model: Model, precision: str, machine: Machine, sheet: Datasheet, gpus: int = 1
    ) -> Served:
        """Serve it on a GPU by its datasheet, or on several. Raises ModelError."""
        if precision != "bf16":
            folder = dummy.derive(model, precision)
            model = catalog.load(folder, folder.name)
        config = json.loads((model.path / "config.json").read_text())
        shared: dict[str, FlagValue] = {"tensor-parallel-size": gpus}
        flags = as_one_gpu({**defaults_on_a_gpu(machine, model.shape, shared), **shared})
        steps = cards.steps(config, model.shape, sheet, gpus)
        return cls(model, flags, steps, gpus * sheet.memory_bandwidth_bytes_per_s)

    @classmethod
    def on_file(cls, model: Model, on_file: MachineOnFile) -> Served:
        """Serve it as it is on a machine by what a run there timed."""
        machine = on_file.machine
        return cls(
            model,
            defaults_on_a_gpu(machine, model.shape, {})
            if machine.kind == "gpu"
            else defaults_on_a_cpu(machine, model.shape),
            ends_of_band(on_file.step, on_file.spread),
            on_file.ceilings.memory_bandwidth_bytes_per_s,
            on_cuda=machine.kind == "gpu",
            delays=Delays(),
        )

    def with_blocks(self, blocks: int | None) -> Served:
        """Give its KV cache so many blocks; None leaves it as it is."""
        if blocks is None:
            return self
        block_bytes = self.flags.block_size * self.model.shape.kv_bytes_per_token()
        held = {"kv-cache-memory-bytes": int(blocks * block_bytes)}
        return replace(self, flags=VllmFlags({**self.flags, **held}))

    @property
    def room_tokens(self) -> float:
        """The tokens for which the KV cache has room."""
        bytes_left = max(0, self.flags.kv_cache_memory_bytes)
        return theory.kv_tokens(self.model.shape, bytes_left, 2, self.flags.block_size)

    @property
    def most_tokens(self) -> int:
        """The tokens of the longest request: one fills the cache, or all of the positions."""
        return min(self.model.shape.max_positions, int(self.room_tokens)) - 1

    def fit(self, precision: str, memory_bytes: float, demand: Demand) -> Fit:
        """Say how it fits so much memory, and how many requests of a demand fit beside it."""
        shape = self.model.shape
        return Fit(
            precision,
            shape.held_bytes,
            memory_bytes,
            shape.kv_bytes_per_token(),
            self.room_tokens,
            self.room_tokens / demand.tokens,
        )

    def argv(self, longest_tokens: int) -> tuple[str, ...]:
        more = {"max-model-len": longest_tokens, "enable-prefix-caching": True}
        return (
            *(*Vllm.model_argv(self.model.path), "--load-format", "dummy"),
            *Vllm.flag_argv({**self.flags, **more}),
        )


def defaults_on_a_cpu(machine: Machine, shape: Shape) -> VllmFlags:
    """Return vLLM's own settings on a CPU that a plan needs, with eager steps, as are timed there.

    The KV cache has what vLLM takes by default, or what weights and processes leave if that is
    less.
    """
    left_bytes = machine.memory_bytes - shape.held_bytes - PROCESS_BYTES
    return VllmFlags(
        {
            "block-size": 16,
            "max-num-seqs": 128,
            "kv-cache-memory-bytes": int(min(CPU_KV_BYTES, left_bytes)),
            "enforce-eager": True,
        }
    )


def _on_file(question: Question, on_file: MachineOnFile) -> tuple[Served, tuple[Fit, ...]]:
    """Serve a model on a machine on file, and say how it fits. Raises LabError."""
    on_file.require(question.model)
    if question.precision != "bf16" or question.gpus != 1:
        raise LabError(
            f"on {on_file.machine.slug} one device's step in BF16 was timed: leave PRECISION and TP"
            " out, or name a GPU by its datasheet with MACHINE="
        )
    served = Served.on_file(question.model, on_file)
    kv_bytes = max(0, served.flags.kv_cache_memory_bytes)
    return served, (served.fit("bf16", served.model.shape.held_bytes + kv_bytes, question.demand),)


def _fits(question: Question, machine: Machine, sheet: Datasheet) -> Iterator[Fit]:
    for precision in PRECISIONS:
        try:
            served = Served.of(question.model, precision, machine, sheet, question.gpus)
        except ModelError:  # quantized experts, for example
            continue
        memory_bytes = question.gpus * usable_bytes(machine.memory_bytes)
        yield served.fit(precision, memory_bytes, question.demand)


def _enough_gpus(question: Question) -> int | None:
    """Return the fewest GPUs that share each layer so that it fits; None for no number of them."""
    machine, sheet = machine_of(question.card)
    for gpus in (2, 4, 8):
        if sheet is None or gpus <= question.gpus:
            continue
        if reason_against_sharing(question.model.shape, sheet, gpus):
            continue
        served = Served.of(question.model, question.precision, machine, sheet, gpus)
        if served.room_tokens >= question.demand.tokens:
            return gpus
    return None


def _request_alone(served: Served, demand: Demand) -> Alone:
    shape = served.model.shape
    context = int(demand.prompt_tokens + demand.output_tokens / 2)
    step_s = [times.seconds(Step([Piece(1, context)], 1)) for times in served.steps]
    prompt_s = [
        times.seconds(Step([Piece(int(demand.prompt_tokens), 0)], 1)) for times in served.steps
    ]
    ceiling = served.bandwidth_bytes_per_s / theory.decode_bytes(shape, 1, context)
    return Alone(ceiling, over([1 / s for s in step_s]), over(prompt_s))


def _estimate_per_s(served: Served, question: Question) -> float:
    """Estimate the rate at which TPOT reaches its limit, by a closed form: the grid's middle.

    With b requests in flight a request's share of the engine is its own prefill and its part of
    the steps; the largest batch is the one that keeps TPOT, or fills the cache.
    """
    demand, times = question.demand, served.steps[0]
    shared = demand.document_tokens * demand.documents < served.room_tokens / 2
    prompt = int(demand.prompt_tokens)
    cached = min(prompt - 1, demand.document_tokens) if shared else 0
    best = 0.0
    for batch in (2**i for i in range(11)):
        request_s = times.request_s(batch, prompt, demand.output_tokens, cached)
        if batch > 1 and (
            request_s / demand.output_tokens > question.slo.tpot_s
            or batch * demand.tokens > served.room_tokens
            or (question.in_flight and batch > question.in_flight)
        ):
            break
        best = batch / request_s
    return best


# -------------------------------------------------------------------------------------- forecasts


def _rates(player: _Player) -> dict[float, LoadForecast]:
    """Forecast one replica at rates on both sides of its capacity, if they are found."""
    middle = _estimate_per_s(player.served, player.question)
    tried: dict[float, LoadForecast] = {}
    for grid in GRIDS:
        rates = [float(f"{middle * factor:.2g}") for factor in grid]
        drawn = {rate: _drawn(player.question, rate, player.served.most_tokens) for rate in rates}
        loads = {rate: player.plans(load) for rate, load in drawn.items()}
        tried |= player.forecast(loads, "one replica")
        if tried[rates[-1]].within.high < SHARE:
            break
    return tried


def _capacity(rates: Mapping[float, LoadForecast]) -> Band | None:
    """Find the largest rate that meets the objective; None where the lowest tried does not.

    Between two tried rates the share is interpolated. The ends of the band are those of a faster
    and a slower step.
    """
    expected = _crossing([(rate, load.expected.within) for rate, load in rates.items()])
    slower = _crossing([(rate, load.within.low) for rate, load in rates.items()])
    faster = _crossing([(rate, load.within.high) for rate, load in rates.items()])
    if not expected:
        return None
    return Band(value=expected, low=slower or 0.0, high=faster or expected)


def _crossing(points: Sequence[tuple[float, float]]) -> float | None:
    kept = list(itertools.takewhile(lambda point: point[1] >= SHARE, points))
    if not kept:
        return None
    if len(kept) == len(points):
        return kept[-1][0]
    (below, above_share), (beyond, share) = kept[-1], points[len(kept)]
    return below + (beyond - below) * (above_share - SHARE) / (above_share - share)


def _needed(answer: CapacityPlan, question: Question) -> int | None:
    """Count the replicas: as asked, or as the demand needs at the expected capacity."""
    if question.replicas:
        return question.replicas
    capacity = answer.capacity_per_s.value if answer.capacity_per_s else None
    if not capacity or not question.demand.rate_per_s:
        return None
    needed = math.ceil(question.demand.rate_per_s / capacity)
    return needed if needed <= MOST_REPLICAS else None


def _fleets(player: _Player, replicas: int) -> dict[str, LoadForecast]:
    """Forecast the demand on a fleet, with each router."""
    question, demand = player.question, player.question.demand
    if demand.trace:
        load = _replayed(demand)
    else:
        load = _drawn(question, demand.rate_per_s, player.served.most_tokens)
    loads = {router: player.plans(load, replicas, router) for router in question.routers}
    return player.forecast(loads, f"{replicas} replicas")


@dataclass(frozen=True)
class _Load:
    requests: Sequence[SyntheticRequest]
    schedule_s: tuple[float, ...]
    counted_from_s: float


def _drawn(question: Question, rate_per_s: float, most_tokens: int) -> _Load:
    """Draw requests of up to `most_tokens` that come at random times; the same ones at every rate.

    First, uncounted, as long as an answer within the objective lasts, until when the batch grows;
    then as long again, or until FEWEST count.
    """
    answer_s = question.demand.output_tokens * question.slo.tpot_s
    duration_s = answer_s + max(answer_s, FEWEST / rate_per_s)
    times = Poisson(rate_per_s=rate_per_s).schedule(duration_s, random.Random(0))
    rng = random.Random(1)
    of_trace = [(prompt, output) for _, prompt, output in question.demand.trace]
    lengths = itertools.cycle(of_trace) if of_trace else _lengths(question.demand, most_tokens, rng)
    requests = list(_requests(question.demand, itertools.islice(lengths, len(times)), rng))
    return _Load(requests, tuple(times), answer_s)


def _replayed(demand: Demand) -> _Load:
    lengths = ((prompt, output) for _, prompt, output in demand.trace)
    requests = list(_requests(demand, lengths, random.Random(1)))
    return _Load(requests, tuple(at_s for at_s, _, _ in demand.trace), 0.0)


def _requests(
    demand: Demand, lengths: Iterable[tuple[int, int]], rng: random.Random
) -> Iterator[SyntheticRequest]:
    """Draw the document that each request of these lengths begins with.

    The documents' popularity falls as one over their rank (Zipf), as in web caches (Breslau et al.,
    INFOCOM 1999).
    """
    weights = [1 / rank for rank in range(1, demand.documents + 1)]
    for index, (prompt, output) in enumerate(lengths):
        document = rng.choices(range(demand.documents), weights)[0] if weights else 0
        yield SyntheticRequest(
            index=index, prompt_tokens=prompt, output_tokens=output, document=document,
            document_tokens=min(prompt - 1, demand.document_tokens),
        )  # fmt: skip


def _lengths(demand: Demand, most_tokens: int, rng: random.Random) -> Iterator[tuple[int, int]]:
    """Draw outputs of exponential lengths, cut where the engine would end them."""
    prompt, mean = int(demand.prompt_tokens), demand.output_tokens
    longest = _longest_output(demand, most_tokens)
    while True:
        yield prompt, max(1, round(min(rng.expovariate(1 / mean), longest)))


def _longest_output(demand: Demand, most_tokens: int) -> float:
    return min(LONGEST_OUTPUT * demand.output_tokens, most_tokens - int(demand.prompt_tokens))


@dataclass(frozen=True)
class _Player:
    """Plays loads in virtual time, on a model as it is served."""

    served: Served
    question: Question
    forecasters: Sequence[Forecaster]
    progress: ProgressDisplay
    folder: Path  # for the requests

    def plans(
        self, load: _Load, replicas: int = 1, router: str = "round-robin"
    ) -> list[ForecastPlan]:
        """Write the requests of a load, and plan its plays at each end of the band."""
        file = self.folder / f"{len([*self.folder.iterdir()])}.jsonl"
        in_flight = self.question.in_flight
        with file.open("w") as lines:
            lines.writelines(f"{request.model_dump_json()}\n" for request in load.requests)
        trial = PlannedTrial(
            key="",
            repeat=1,
            requests=file,
            ends_only=True,
            routing=Routing(rule=router),
            traffic=Traffic(
                kind="open",
                schedule_s=load.schedule_s,
                most_in_flight=in_flight and replicas * in_flight,
                warmup_s=load.counted_from_s,
                window_s=max(1e-9, load.schedule_s[-1] - load.counted_from_s),
            ),
        )
        argv = self.served.argv(self._longest_tokens + 1)
        return [
            ForecastPlan(
                delays=self.served.delays.of_servers(replicas),
                engines=(
                    PlannedEngine(
                        argv=argv,
                        step_times=step_times,
                        replicas=replicas,
                        on_cuda=self.served.on_cuda,
                        trials=(trial,),
                    ),
                ),
            )
            for step_times in self.served.steps
        ]

    def forecast(
        self, loads: Mapping[Name, Sequence[ForecastPlan]], where: str
    ) -> dict[Name, LoadForecast]:
        """Play the plans of these loads. Raises ForecastError."""
        return forecast_loads(loads, self.forecasters, self.question.slo, self.progress, where)

    @property
    def _longest_tokens(self) -> int:
        """The tokens of the longest request that any load may have."""
        demand = self.question.demand
        if demand.trace:
            return max(prompt + output for _, prompt, output in demand.trace)
        return int(demand.prompt_tokens) + math.ceil(
            _longest_output(demand, self.served.most_tokens)
        )


# ------------------------------------------------------------------------------------------ money


def _price(question: Question, answer: CapacityPlan) -> Price | None:
    """Compare renting a GPU with buying tokens; None without a price and a capacity."""
    if question.usd_per_hour is None or answer.capacity_per_s is None:
        return None
    usd_per_hour, capacity = question.gpus * question.usd_per_hour, answer.capacity_per_s
    tokens_per_s = [
        per_s * question.demand.output_tokens
        for per_s in (capacity.value, capacity.high, capacity.low)
    ]
    usd_per_million = [usd_per_hour / 3600 / per_s * 1e6 for per_s in tokens_per_s if per_s]
    return Price(
        usd_per_hour=usd_per_hour,
        million_tokens_per_day=over([per_s * 86_400 / 1e6 for per_s in tokens_per_s]),
        # a slower step may serve none within the objective
        usd_per_million=over(usd_per_million) if all(tokens_per_s) else None,
        api_usd_per_million=question.api_usd_per_million,
    )
