"""vLLM's throughput under our load generator and under `vllm bench serve`."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import mean

from bench.clients import (
    ENGINE_FLAGS,
    REQUESTS,
    USERS,
    AnswerTimes,
    rate,
    send_by_locust,
    send_by_vllm_bench,
    tpot_ms,
    ttft_ms,
    write_work,
)
from bench.clock import Clock
from bench.console import aim, console, table, within
from bench.load import locust
from labs.harness.judging.judge import Contrast, contrast
from labs.harness.telling import instruments
from serving import metrics
from serving.engines.vllm import Vllm
from serving.hardware import machine as machines
from serving.weights import models

OURS, THEIRS, FREE = "our Locust", "vllm bench serve", "vllm bench serve, unpinned"


def measure(
    clock: Clock, work: Path, pairs: int, unpinned: bool, locustfiles: Sequence[Path]
) -> instruments.Engine:
    """Send the same requests by our Locust and by vLLM's own tool, in turn, to one engine."""
    machine = machines.detect()
    model = models.resolve(machine)
    write_work(work, model)
    clock.tell("starting vLLM", 0)
    with contextlib.ExitStack() as exits:
        served = Vllm("bench", model, ENGINE_FLAGS, kind=machine.kind, log=work / "engine.log")
        exits.callback(served.stop)
        arms: dict[str, Callable[[Path], list[AnswerTimes]]] = {}
        for i, file in enumerate(locustfiles):
            load = exits.enter_context(locust(USERS, work / f"locust{i}", file))
            name = str(file) if i else OURS
            arms[name] = partial(send_by_locust, load, served.url, work / "requests.jsonl")
        pinned, everywhere = machines.split_cores()[1], sorted(os.sched_getaffinity(0))
        arms[THEIRS] = partial(send_by_vllm_bench, served, model, work / "prompts.json", pinned)
        if unpinned:
            arms[FREE] = partial(
                send_by_vllm_bench, served, model, work / "prompts.json", everywhere
            )
        served.wait()
        clock.tell("warming up", 0)
        arms[OURS](work / "warm-up")
        answers: dict[str, list[list[AnswerTimes]]] = {name: [] for name in arms}
        counted: dict[str, set[tuple[float, float]]] = {name: set() for name in arms}
        for pair in range(pairs):  # A B, B A, ...: a drift affects both in the same way
            for i, name in list(enumerate(arms))[:: -1 if pair % 2 else 1]:
                clock.tell(f"{name}, {pair + 1} of {pairs}", (pair + 0.5) / (pairs + 1))
                before = served.snapshot()
                answers[name].append(arms[name](work / f"{pair}-{i}"))
                time.sleep(0.3)  # the engine counts a request a moment after its last chunk
                if before and (after := served.snapshot()):
                    delta = after.since(before).values
                    counted[name].add(
                        (delta[metrics.PROMPT_TOKENS], delta[metrics.GENERATION_TOKENS])
                    )
    show(answers, counted)
    figures = (ratio_of(answers, OURS, of) for of in (rate, ttft_ms, tpot_ms))
    throughput, ttft, tpot = (figure.ratio for figure in figures)
    return instruments.Engine(throughput=throughput, ttft=ttft, tpot=tpot)


def ratio_of(
    answers: Mapping[str, Sequence[Sequence[AnswerTimes]]],
    name: str,
    of: Callable[[Sequence[AnswerTimes]], float],
) -> Contrast:
    """Compute the ratio of a figure under one tool to that under vLLM's, paired by round."""
    of_tools = (dict(enumerate(map(of, answers[tool]))) for tool in (name, THEIRS))
    ratio = contrast(*of_tools, paired=True)
    assert ratio
    return ratio


def show(
    answers: Mapping[str, Sequence[Sequence[AnswerTimes]]],
    counted: Mapping[str, set[tuple[float, float]]],
) -> None:
    """Print every run of every tool, the aim for throughput, and whether the latencies agree."""
    clients_table = table(
        f"The same {REQUESTS} requests on the same engine, {USERS} at a time",
        *("client", "output tok/s, each run", "mean", "TTFT mean (ms)", "TPOT mean (ms)"),
        *("engine's tokens, in + out",),
    )
    for name, runs in answers.items():
        rates = [rate(run) for run in runs]
        clients_table.add_row(
            name,
            " ".join(f"{r:.0f}" for r in rates),
            f"{mean(rates):.1f}",
            f"{mean(ttft_ms(run) for run in runs):.1f}",
            f"{mean(tpot_ms(run) for run in runs):.2f}",
            ", ".join(f"{p:.0f} + {g:.0f}" for p, g in sorted(counted[name])),
        )
    console.print(clients_table)
    console.print(
        "[dim]Output tokens / (last token - first send), computed alike for both from each tool's"
        " own stamps. vllm bench's TTFT is to its first event, which may be the role chunk.[/]"
    )
    for name in (name for name in answers if name not in (THEIRS, FREE)):
        ratio = ratio_of(answers, name, rate).ratio
        wide = ratio.low is not None and ratio.low < 0.97 < ratio.value
        doubt = "the interval includes the bound: try more --pairs" if wide else ""
        figure = f"throughput under {name} / {THEIRS}{within(ratio)}"
        aim(figure, ratio.value, 0.97, at_least=True, doubt=doubt)
    for latency, of in (("TTFT", ttft_ms), ("TPOT", tpot_ms)):
        ratio = ratio_of(answers, OURS, of).ratio
        if ratio.low and ratio.high:
            agree = "they agree" if ratio.low <= 1 <= ratio.high else "they differ"
            text = f"Mean {latency}, {OURS} / {THEIRS}: {ratio.value:.3f}{within(ratio)}: {agree}"
            console.print(text)
    if len(set().union(*counted.values())) > 1:
        console.print("[red]The tools did not send the same work: see the engine's counts.[/]")
