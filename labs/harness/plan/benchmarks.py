"""Turn another tool's command into a lab of one variant, to be played here.

What has no counterpart is named, and a load that cannot be translated is refused. A benchmark of so
many requests becomes a trace of as many: their lengths, and in an open loop their times. Those of
`vllm bench serve` are drawn as it draws them, from its seed, as is the order of prefixes (vLLM
0.32, `benchmarks/serve.py` and `benchmarks/datasets`); of the other tools only the distributions
are the same (GuideLLM 0.8, AIPerf 0.13). A published claim is such a command in
`published_claims.toml`.
"""

from __future__ import annotations

import json
import math
import random
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import accumulate
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from labs.harness.derived.score import COLUMNS
from labs.harness.plan.command_lines import (
    TABLE,
    TOOLS,
    Options,
    impossible,
    nearest,
    note,
    number,
    pairs,
    parsed,
    serve_flags,
    tool_of,
)
from labs.harness.spec.declare import sends
from labs.harness.spec.lab import SLO, Lab, LabError, Variant
from labs.harness.storage import bounded
from loadtests.arrivals import MAX_USERS, AnyArrival, Capped, Concurrent, Waves
from loadtests.records import MOST_TOKENS
from loadtests.trace import MOST_ROWS
from loadtests.workload import Prefix, Workload
from serving.engines.flags import FlagValue
from serving.processes.masking import masked

NAME = "others-benchmark"  # of the lab, hence of its folder of results
REPEATS = 3
TIMEOUT_S = 6 * 3600.0  # that `vllm bench serve` awaits an answer
LONG_S = 3600.0  # the window of a closed loop that ends with its requests
GUIDELLM_AT_ONCE = 512  # the cap of GuideLLM's throughput profile, unless it is told otherwise
EVENLY = math.inf  # the burstiness of equal gaps
MOST_REQUESTS = 100_000  # of a load whose lengths and times are drawn
CPU_KV_BYTES = 2**30  # of a variant that does not say how large its cache is
Lengths = Sequence[tuple[int, int]]  # prompt and output tokens of each request


@dataclass(frozen=True)
class Load:
    """One load of a benchmark: of so many requests, or for so long."""

    lengths: Lengths
    times_s: Sequence[float] = ()  # of an open loop
    in_flight: int | None = None  # at most; None: no limit
    seconds: float | None = None  # that the users of a closed loop go on for; None: to the last
    name: str = ""

    def workload(self, prefix: Prefix | None) -> Workload:
        """Write it in the vocabulary of labs, with its first `MOST_ROWS` requests."""
        times_s = self.times_s or [0.0] * len(self.lengths)
        rows = zip(times_s, self.lengths, strict=True)
        trace = tuple((round(at_s, 6), *lengths) for at_s, lengths in rows)[:MOST_ROWS]
        users = min(self.in_flight or len(trace), len(trace))
        arrival: AnyArrival
        name = f"in-flight-{users}" if self.in_flight else "at-once"
        if self.times_s:
            name = f"{self.name}-{name}" if self.in_flight else self.name
            arrival = Capped(speed=1, users=min(users, MAX_USERS))
        else:
            arrival = Concurrent(users=users) if self.in_flight else Waves(size=users)
        prompts, outputs = (round(fmean(column)) for column in list(zip(*trace, strict=True))[1:])
        return sends(
            name, prompts, outputs, arrival, trace=trace, prefix=prefix, most_requests=len(trace)
        )


@dataclass(frozen=True)
class Benchmark:
    """What a command asks for."""

    model: str
    seed: int
    loads: Sequence[Load]
    prefix: Prefix | None
    notes: Sequence[str]


@dataclass(frozen=True)
class Translated:
    """A lab that plays what a command asked for, and what is said of the translation."""

    lab: Lab
    tool: str
    model: str  # that is to be served; empty for the machine's own
    notes: Sequence[str]  # what is not translated, or otherwise, a sentence each
    recorded: Mapping[str, str]  # the command lines, for the run's manifest


def translate(command: str, serve: str = "", model: str = "") -> Translated:
    """Translate a benchmark's command, and the line that started its server.

    `model` is served in the place of theirs. Raises LabError for an option that is unknown or a
    value that is impossible, and NotTranslatedError where there is no such load here.
    """
    tool, words = tool_of("COMMAND", command, TOOLS)
    options = parsed(tool, words)
    benchmark = READERS[tool](options)
    named, flags, of_serve = serve_flags(serve)
    theirs = named or benchmark.model
    notes = [*options.notes, *benchmark.notes, *of_serve]
    if model and theirs and model != theirs:
        notes.append(note("model", model=model, theirs=theirs))
    elif not (model or theirs):
        notes.append(note("no_model"))
    for load in benchmark.loads:
        if len(load.lengths) > MOST_ROWS:
            notes.append(note("first_rows", given=len(load.lengths), kept=MOST_ROWS))
    recorded = {"COMMAND": masked(command)} | ({"SERVE": masked(serve)} if serve else {})
    return Translated(_lab(tool, benchmark, flags), tool, model or theirs, notes, recorded)


def _lab(tool: str, benchmark: Benchmark, flags: dict[str, FlagValue]) -> Lab:
    workloads = [load.workload(benchmark.prefix) for load in benchmark.loads]
    window_s = max(
        workload.trace[-1][0] + 1e-3 if load.times_s else load.seconds or LONG_S
        for load, workload in zip(benchmark.loads, workloads, strict=True)
    )
    return Lab(
        name=NAME,
        title=f"{TABLE['title']}: {tool}",
        question=TABLE["question"],
        answers=(),
        variants=(Variant(name="theirs", flags=flags),),
        workloads=tuple(workloads),
        claims=(),
        slo=SLO(ttft_s=1, tpot_s=0.1),
        requests=max(len(workload.trace) for workload in workloads),
        warmup_s=0,
        window_s=window_s,
        timeout_s=TIMEOUT_S,
        repeats=REPEATS,
        most_repeats=0,
        seed=benchmark.seed,
        scales={"cpu": {"flags": {"kv-cache-memory-bytes": CPU_KV_BYTES}}},
    )


# ------------------------------------------------------------------------------- the three tools


def _vllm(options: Options) -> Benchmark:
    dataset, path = options.text("dataset", "random"), options.text("path")
    if dataset not in ("random", "prefix_repetition") or path:
        known = "random, prefix_repetition"
        impossible("dataset", tool=options.tool, given=f"{dataset} {path}".strip(), known=known)
    if options.text("ramp"):
        impossible("ramp", given=options.option("ramp"))
    seed, burstiness = options.whole("seed", 0, 0), options.number("burstiness", 1.0)
    requests, rate = _count(options.whole("prompts", 1000)), options.number("rate", math.inf)
    notes = [note("chat" if "chat" in options.text("backend") else "completions")]
    if dataset == "random":
        prefix_tokens, groups, order = options.whole("prefix_tokens", 0, 0), 1, list[int]()
        lengths = _uniform(options, requests, seed, 0 if prefix_tokens else 1)
        if len({*lengths}) > 1:
            notes.append(note("special_tokens"))
    else:
        prefix_tokens = options.whole("repeated_prefix_tokens", 256, 0)
        groups = options.whole("repeated_prefixes", 10)
        output_tokens = options.whole("repeated_output_tokens", 128)
        output_tokens = options.whole("any_output_tokens", output_tokens)
        if requests < groups:
            raise LabError(f"COMMAND: --num-prompts {requests} is fewer than {groups} prefixes")
        order = [group for group in range(groups) for _ in range(requests // groups)]
        if "unshuffled" not in options.given:
            random.Random(seed).shuffle(order)
        least = 0 if prefix_tokens else 1
        own_tokens = options.whole("repeated_suffix_tokens", 256, least)
        lengths = [(own_tokens, output_tokens)] * len(order)
        if rate < math.inf and burstiness < EVENLY:
            notes.append(note("times"))
        if "ignore_end" not in options.given:
            notes.append(note("ends"))
    prefix = None
    if prefix_tokens:
        prefix = Prefix(
            tokens=prefix_tokens, groups=groups, order=tuple(order[:MOST_ROWS]), with_template=True
        )
    lengths = [(prefix_tokens + prompt, output) for prompt, output in lengths]
    times_s = list[float]()
    if rate < math.inf:
        times_s = _times_s(len(lengths), rate, burstiness, seed)
        times_s = [at_s * len(lengths) / rate / times_s[-1] for at_s in times_s]
    load = Load(lengths, times_s, options.whole("in_flight"), name=f"rate-{rate:g}")
    return Benchmark(options.text("model"), seed, _sendable(options, [load]), prefix, notes)


def _uniform(options: Options, requests: int, seed: int, least: int) -> list[tuple[int, int]]:
    """Draw lengths as the random dataset does: whole numbers around each mean.

    `least` is the fewest tokens that a prompt may have beside a prefix; an answer has one at least.
    """
    option, text = options.option("range_ratio"), options.text("range_ratio", "0")
    ratios = pairs(option, text) if text.startswith("{") else {"input": text, "output": text}
    means = {
        "input": options.whole(
            "any_prompt_tokens", options.whole("prompt_tokens", 1024, least), least
        ),
        "output": options.whole("any_output_tokens", options.whole("output_tokens", 128, 0), 0),
    }
    rng, columns = np.random.default_rng(seed), list[list[int]]()
    for part, mean in means.items():
        given = str(ratios.get(part, 0))
        ratio = 0.0 if given in ("0", "0.0") else number(option, given)
        if ratio >= 1:
            raise LabError(f"COMMAND: {option} {given} is not possible: give less than 1")
        ends = math.floor(mean * (1 - ratio)), math.ceil(mean * (1 + ratio))
        low, high = (max(least if part == "input" else 1, end) for end in ends)
        columns.append(rng.integers(low, high + 1, size=requests).tolist())
    return list(zip(*columns, strict=True))


def _times_s(count: int, rate: float, burstiness: float, seed: int) -> list[float]:
    """Draw times whose gaps have a gamma distribution, by the generator that vLLM draws from."""
    if burstiness == EVENLY:
        return [(i + 1) / rate for i in range(count)]
    gaps_s = np.random.RandomState(seed).gamma(burstiness, 1 / (rate * burstiness), count)
    return list(accumulate(gaps_s.tolist()))


def _guidellm(options: Options) -> Benchmark:
    given = options.given.get("dataset", [])
    data = pairs("--data", given[-1]) if len(given) == 1 else {}
    fields = ("prompt_tokens", "output_tokens")
    if not data.keys() & set(fields):
        known = "prompt_tokens=..,output_tokens=.."
        impossible("dataset", tool=options.tool, given=" ".join(given) or "nothing", known=known)
    shapes = [f"{field}{end}" for field in fields for end in ("", "_stdev", "_min", "_max")]
    for name in sorted(data.keys() - {*shapes, "kind", "samples", "source"}):
        raise LabError(f"COMMAND: --data {name}= is not known here{nearest(name, shapes)}")
    profile = pairs("--profile", text := options.text("profile", "sweep")) or {"kind": text}
    kind, listed = str(profile["kind"]), profile.get("rate", profile.get("streams"))
    levels: list[Any] = [
        level for text in options.given.get("rate", []) for level in text.split(",")
    ]
    levels = levels or (listed if isinstance(listed, list) else [listed] if listed else [])
    cap = number("max_concurrency", profile.get("max_concurrency"), None, 1, whole=True)
    requests, seconds, notes = options.whole("prompts"), options.number("seconds"), list[str]()
    for text in options.given.get("constraints", []):
        limit = pairs("--constraint", text)
        if limit.get("kind") in ("max_requests", "min_requests"):
            requests = number("count", limit.get("count"), None, 1, whole=True)
        elif limit.get("kind") == "max_duration":
            seconds = number("seconds", limit.get("seconds"))
        else:
            notes.append(note("constraint", given=text))
    if not (requests or seconds):
        impossible("end", example="--max-requests 100")
    seed = pairs("--seed", options.text("seed")).get("value") or options.text("seed")
    seed = number("--seed", seed, 42, 0, whole=True)
    if kind == "synchronous":
        levels = [1]
    elif kind == "throughput":
        levels = [cap or (levels or [GUIDELLM_AT_ONCE])[0]]
    elif kind not in (open_loops := ("constant", "async", "poisson")) and kind != "concurrent":
        known = ", ".join(("synchronous", "concurrent", "throughput", *open_loops))
        impossible("profile", tool=options.tool, given=f"--profile {kind}", known=known)
    if not levels:
        impossible("rate", option="--rate", given=f"--profile {kind}")
    rng, loads = np.random.default_rng(seed), list[Load]()
    for level in levels:
        if kind in ("synchronous", "concurrent", "throughput"):
            users = number("--rate", str(level).removesuffix(".0"), None, 1, whole=True)
            lengths = _around(rng, data, fields, _count(requests or MOST_ROWS))
            loads.append(Load(lengths, (), users, None if requests else seconds))
            continue
        rate = number("--rate", level)
        lengths = _around(rng, data, fields, _count(requests, seconds, rate))
        times_s = _times_s(len(lengths), rate, 1.0 if kind == "poisson" else EVENLY, seed)
        loads.append(Load(lengths, times_s, cap, name=f"{kind}-{rate:g}"))
    notes.append(note("own_draws", tool=options.tool))
    text_only = options.text("request_type") in ("completions", "text_completions")
    notes.append(note("completions" if text_only else "chat"))
    model = pairs("--backend", options.text("backend")).get("model") or options.text("model")
    return Benchmark(str(model), seed, _sendable(options, loads), None, notes)


def _aiperf(options: Options) -> Benchmark:
    for name in ("file", "public", "mix", "users", "turns", "endpoint"):
        text = options.text(name)
        if text and (name, text) not in (
            ("turns", "1"), ("endpoint", "chat"), ("endpoint", "completions"),
        ):  # fmt: skip
            given = f"{options.option(name)} {text}"
            impossible("dataset", tool=options.tool, given=given, known="synthetic prompts")
    rate, in_flight = options.number("rate"), options.whole("in_flight")
    requests, seconds = options.whole("prompts"), options.number("seconds")
    if not (requests or seconds):
        requests = max(10, 2 * (in_flight or 1))  # as AIPerf does for synthetic prompts
    if not options.text("output_tokens"):
        impossible("length", option=options.option("output_tokens"))
    data = {name: options.text(name) for name in ("prompt_tokens", "output_tokens")}
    data["prompt_tokens"] = data["prompt_tokens"] or "550"
    data |= {f"{name}_stdev": options.text(name.replace("tokens", "spread")) for name in [*data]}
    seed, notes = options.whole("seed", 0, 0), [note("own_draws", tool=options.tool)]
    count = _count(requests, seconds, rate) if rate else _count(requests or MOST_ROWS)
    lengths = _around(np.random.default_rng(seed), data, ("prompt_tokens", "output_tokens"), count)
    groups = options.whole("prefixes", 0, 0)
    shared = options.whole("prefix_tokens" if groups else "system_tokens", 0, 0)
    prefix = None
    if shared:
        even = 1 / groups if groups > 1 else None  # each prompt draws its prefix
        prefix = Prefix(tokens=shared, groups=groups or 1, favourite=even, with_template=True)
    lengths = [(shared + prompt, output) for prompt, output in lengths]
    pattern, times_s = options.text("pattern", "poisson"), list[float]()
    burstiness = {"poisson": 1.0, "constant": EVENLY, "gamma": options.number("burstiness", 1.0)}
    if pattern not in burstiness:
        raise LabError(f"COMMAND: --arrival-pattern {pattern}: give {', '.join(burstiness)}")
    if rate:
        times_s = _times_s(count, rate, burstiness[pattern], seed)
        notes += [note("catch_up")] if in_flight else []
    else:
        in_flight = in_flight or 1
    load = Load(
        lengths, times_s, in_flight, None if requests else seconds, f"{pattern}-{rate or 0:g}"
    )
    notes.append(note(options.text("endpoint", "chat")))
    return Benchmark(options.text("model"), seed, _sendable(options, [load]), prefix, notes)


READERS: Mapping[str, Callable[[Options], Benchmark]] = dict(
    zip(TOOLS, (_vllm, _guidellm, _aiperf), strict=True)
)


def _count(requests: int | None, seconds: float | None = None, rate: float = math.inf) -> int:
    """Count the requests of a load: as many as are asked for, or come in the time at this rate.

    Raises NotTranslatedError for more than can be drawn.
    """
    count = min(requests or math.inf, max(1, rate * (seconds or math.inf)))
    if count > MOST_REQUESTS:
        impossible("many", given=count, most=MOST_REQUESTS)
    return int(count)


def _around(
    rng: np.random.Generator, data: Mapping[str, Any], fields: Sequence[str], count: int
) -> Lengths:
    """Draw lengths: normal around each mean, or uniform between two ends, and cut at these."""
    columns = list[list[int]]()
    for field in fields:
        if (mean := number(field, data.get(field), None, 1, whole=True)) is None:
            impossible("length", option=field)
        spread_text = str(data.get(f"{field}_stdev") or "0")
        spread = 0.0 if spread_text in ("0", "0.0") else number(f"{field}_stdev", spread_text)
        low, high = (
            number(f"{field}{end}", data.get(f"{field}{end}"), None, 1, whole=True)
            for end in ("_min", "_max")
        )
        if not (low or 1) <= mean <= (high or MOST_TOKENS):
            raise LabError(f"COMMAND: {field}={mean} does not lie between {low} and {high}")
        drawn: Any = np.full(count, mean)
        if spread:
            drawn = np.rint(rng.normal(mean, spread, size=count))
        elif low or high:
            drawn = rng.integers(low or mean, (high or mean) + 1, size=count)
        columns.append(np.clip(drawn, low or 1, high or MOST_TOKENS).astype(int).tolist())
    return list(zip(*columns, strict=True))


def _sendable(options: Options, loads: Sequence[Load]) -> Sequence[Load]:
    """Check that no load is more at once than can be sent. Raises NotTranslatedError."""
    for load in loads:
        at_once = min(load.in_flight or len(load.lengths), len(load.lengths))
        if at_once > MAX_USERS and not load.times_s:
            option = TABLE[options.tool]["used"].get("in_flight", "--rate V").split()[0]
            impossible("burst", given=at_once, most=MAX_USERS, option=f"{option} {MAX_USERS}")
    return loads


# --------------------------------------------------------------------- their figures, and claims


def theirs(path: Path, translated: Translated | None = None) -> list[list[float | None]]:
    """Read a tool's own file of results: for each load the figures of `COLUMNS`.

    Raises LabError where there are none, or not those of the tool and the loads of a command.
    """
    try:
        content = json.loads(bounded.text(path))
    except (OSError, ValueError) as error:
        raise LabError(f"THEIRS={path} cannot be read as JSON: {error}") from error
    for tool in [translated.tool] if translated else TOOLS:
        runs = _at(content, TABLE[tool]["runs"]) if "runs" in TABLE[tool] else [content]
        rows = [[_figure(run, TABLE[tool]["theirs"], c) for c in COLUMNS] for run in runs or []]
        if translated and rows and len(rows) != len(translated.lab.workloads):
            loads = len(translated.lab.workloads)
            raise LabError(f"THEIRS={path} has {len(rows)} loads, and the command {loads}")
        if rows and all(any(value is not None for value in row) for row in rows):
            return rows
    known = translated.tool if translated else ", ".join(TOOLS)
    raise LabError(f"THEIRS={path} has no figures of {known}: give the JSON that it saved")


def _figure(run: Any, places: Mapping[str, str], column: str) -> float | None:
    value = _at(run, places[column]) if column in places else None
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    return value / 1000 if COLUMNS[column] == "s" else float(value)


def _at(content: Any, place: str) -> Any:
    """Return what lies at a dotted place; None where there is nothing."""
    parts = place.split(".")
    return reduce(lambda at, part: at.get(part) if isinstance(at, dict) else None, parts, content)


@dataclass(frozen=True, kw_only=True)
class PublishedClaim:
    """A figure that others published, as the command that measures it."""

    figure: str
    source: str
    card: str  # of MACHINE=
    shape: str  # of serving/models/dummy.py
    serve: str
    command: str
    weights: str = ""  # of serving/models/dummy.py, with which it is forecast
    not_given: tuple[str, ...] = ()  # by the source, and what stands in


def published_claims() -> dict[str, PublishedClaim]:
    """Read the published claims, by their names."""
    content = Path(__file__).with_name("published_claims.toml").read_text()
    return {name: PublishedClaim(**of) for name, of in tomllib.loads(content).items()}
