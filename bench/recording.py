"""The share of the load generator's CPU time that goes into recording for Prometheus."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from statistics import mean

import requests

from bench import trials
from bench.clock import Clock
from bench.console import aim
from bench.load import locust
from bench.trials import Totals
from bench.truth import Program
from labs.harness.judging.judge import mean_interval
from labs.harness.telling import instruments
from loadtests import generator
from serving.processes.ports import LOOPBACK

UNRECORDED = Path(__file__).with_name("unrecorded.py")
RECORDED = Program(108)  # streams of a token every 10 ms: 10,000 tokens/s


def measure(clock: Clock, work: Path, pairs: int) -> instruments.Recording:
    """Send the same streams to a Locust that records and to one that does not, in turn.

    Locust's master records, and its load workers do the same work in both: so only the master's CPU
    time is compared, and then taken as a share of all.
    """
    shares, rates = [], []
    with contextlib.ExitStack() as exits:
        clock.tell("starting Locust", 0)
        loads = {
            file: exits.enter_context(locust(RECORDED.streams, work / file.stem, file))
            for file in (generator.LOCUSTFILE, UNRECORDED)
        }
        for pair in range(pairs):
            costs = {file: Totals() for file in loads}
            for i, (file, load) in enumerate(list(loads.items())[:: -1 if pair % 2 else 1]):
                clock.tell(f"{file.stem}, {pair + 1} of {pairs}", (pair + i / 2) / pairs)
                scraped = file == generator.LOCUSTFILE
                with scraping(load.exporter_port) if scraped else contextlib.nullcontext():
                    trials.measure(RECORDED, load, work / f"{pair}-{i}", costs[file])
            recorded, bare = costs.values()
            shares.append(recording_share(recorded, bare))
            tokens_per_chunk = recorded.tokens / recorded.chunks
            rates.append(mean(recorded.delivered) * RECORDED.ideal_chunks_per_s * tokens_per_chunk)
    share = mean_interval(shares)
    wide = share.high is not None and share.value < 0.03 < share.high
    doubt = "the interval includes the bound: try more --pairs" if wide else ""
    interval = (
        f" (95% interval {share.low:.1%} to {share.high:.1%})" if share.low is not None else ""
    )
    figure = f"recording's share of the generator's CPU at {mean(rates):,.0f} tokens/s{interval}"
    aim(figure, 100 * share.value, 3.0, "%", doubt=doubt)
    return instruments.Recording(tokens_per_s=mean(rates), share=share)


def recording_share(recorded: Totals, bare: Totals) -> float:
    """Compute what recording adds to the CPU time a token, as a share of the generator's."""
    more_s = recorded.master_cpu_s / recorded.tokens - bare.master_cpu_s / bare.tokens
    return more_s / (recorded.all_cpu_s / recorded.tokens)


@contextlib.contextmanager
def scraping(port: int) -> Iterator[None]:
    """Read the exporter once a second during the block, as Prometheus does."""
    ended = threading.Event()

    def scrape() -> None:
        while not ended.wait(1.0):
            requests.get(f"http://{LOOPBACK}:{port}/metrics", timeout=5).raise_for_status()

    scraper = threading.Thread(target=scrape)
    scraper.start()
    try:
        yield
    finally:
        ended.set()
        scraper.join()
