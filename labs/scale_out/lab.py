"""Scale out: what is asked of it. Its words stand in page.md, its sizes in sizes.toml."""

from __future__ import annotations

from labs.harness.spec.declare import counter, predicts, rises, sends, users
from labs.harness.spec.lab import SLO, Lab, Point, Variant
from loadtests.arrivals import Offered, Ramp
from serving import metrics

QUEUEING = "fluid limit of a queue; Newell, Applications of Queueing Theory, 1982"
FLUID = (
    "requests flow as a fluid: no bursts",
    "a second replica serves as much as the first",
)


@predicts("replicas / replicas", "all replicas are busy, and none slows another")
def as_many(more: Point, fewer: Point) -> float:
    return more.flags.replicas / fewer.flags.replicas


def in_time(point: Point) -> float:
    """Return the share of requests that are sent before t*, where every later one is late."""
    assert point.slo
    assert isinstance(point.load, Offered)
    load = point.load.times / point.flags.replicas
    if load <= 1:
        return 1.0
    start_s, end_s = point.measured_s
    until_s = min(end_s, point.slo.ttft_s / (load - 1))
    return max(0.01, (until_s - start_s) / (end_s - start_s))


@predicts(
    "share sent before t* = SLO / (load / replicas - 1), of the one / of the other",
    *FLUID,
    source=QUEUEING,
)
def goodput_ratio(more: Point, fewer: Point) -> float:
    return in_time(more) / in_time(fewer)


(FULL,), RISING = users(12), Ramp(first=0.5, last=2.5)
MORE, BOTH = Offered(times=1.3), Offered(times=2.5)  # than one serves, and than two
HEALTHY = Offered(times=0.7)  # under which a signal is not to alarm
# to the replica with fewer requests: the router refuses power_of_two before one alone
ONE = Variant(name="one", flags={"router-policy": "cache_aware", "router-balance-abs-threshold": 1})
TWO = ONE.but("two", {"replicas": 2})
TWO_OF_ONE = "two / one"

LAB = Lab(
    name="scale-out",
    answers=("SA-5",),
    variants=(ONE, TWO),
    flags={
        "max-model-len": 512,
        "max-num-seqs": 8,
        "enforce-eager": True,
        "block-size": 32,
        "enable-prefix-caching": False,  # nothing may be cheaper the second time
        "kv-cache-memory-bytes": 96 * 2**20,
        "num-gpu-blocks-override": 26,  # a full batch fills it
    },
    workloads=(
        sends("full", 80, 16, FULL, only=("one",)),
        sends("more", 80, 16, MORE, BOTH),
        sends("healthy", 80, 16, HEALTHY, only=("one",)),
        sends("rising", 80, 16, RISING, only=("one",)),
    ),
    claims=(
        rises("mends", "goodput_per_s", TWO_OF_ONE, "more", MORE, by=goodput_ratio),
        rises("twice", "output_tokens_per_s", TWO_OF_ONE, "more", BOTH, by=as_many),
    ),
    evidence=(
        counter(metrics.of_replica(metrics.REQUESTS, 1), "rises", "two"),
        counter(metrics.of_replica(metrics.REQUESTS, 1), "absent", "one"),
        counter(metrics.PREEMPTIONS, "stays"),
    ),
    probes=("joining",),
    probed=("one",),
    findings=("start", "leads", "joining", "days"),
    slo=SLO(ttft_s=1.0, tpot_s=0.3),
    requests=1024,
    warmup_s=0.5,
    window_s=8,
    repeats=3,
)
