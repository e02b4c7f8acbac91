"""Multi-LoRA: what is asked of it. Its words stand in page.md, its sizes in sizes.toml."""

from __future__ import annotations

from labs.harness.spec import theory
from labs.harness.spec.declare import (
    counter,
    echoes,
    falls,
    predicts,
    rises,
    sends,
    unchanged,
    users,
)
from labs.harness.spec.lab import SLO, Lab, Point, Variant
from loadtests.workload import Adapters, Workload
from serving import metrics

TENANTS = 8


def adapter_bytes(point: Point) -> float:
    """Return the bytes of an adapter at `max-lora-rank`, to which vLLM pads every adapter."""
    about = point.about["adapters"]
    rank = point.flags.max_lora_rank
    return 2 * float(about["params_per_adapter"]) * rank / float(about["rank"])


def step_s(point: Point) -> float:
    """Predict a decode step: it reads weights, KV, and every adapter in the batch."""
    moved = point.kv_bytes()
    if point.workload.adapters:
        moved += adapter_bytes(point) * min(point.workload.adapters.count, point.load.users)
    return theory.forward_of(point, moved)


ADAPTERS = "Chen et al., Punica, MLSys 2024; Sheng et al., S-LoRA, MLSys 2024"
READING = "reading is all a step does: the launches to apply an adapter are free"


@predicts("(weights + KV + active adapters) bytes, baseline / treatment", READING, source=ADAPTERS)
def by_bytes(treatment: Point, baseline: Point) -> float:
    return step_s(baseline) / step_s(treatment)


@predicts("(weights + KV + active adapters) bytes, treatment / baseline", READING, source=ADAPTERS)
def longer_by_bytes(treatment: Point, baseline: Point) -> float:
    return 1 / by_bytes(treatment, baseline).value


def running_share(point: Point) -> float:
    """Return requests that run at once / requests in flight, where `max-loras` slots hold adapters.

    A slot serves all requests in flight of its adapter. In turn, each adapter has its even part; by
    Zipf's law the one whose turn it is (drawn by its share p) has 1 + (B - 1) p of them.
    """
    adapters, batch = point.workload.adapters, point.load.users
    assert adapters
    slots = min(point.flags.max_loras, adapters.count)
    each = batch / adapters.count
    if adapters.mix == "zipf":
        shares = [1 / k for k in range(1, adapters.count + 1)]
        each = 1 + (batch - 1) * sum(s**2 for s in shares) / sum(shares) ** 2
    return min(1.0, slots * each / batch)


def first_token_s(point: Point) -> float:
    """Predict TTFT: the wait for a slot (Little's law over the answers), a prefill and a step."""
    waits_s = (1 / running_share(point) - 1) * (point.output_tokens * step_s(point))
    return waits_s + theory.prefill_of(point) + step_s(point)


@predicts(
    "((1 / share running - 1) L t(B) + t_prefill + t(B)), treatment / baseline",
    "a request waits while both slots hold other adapters whose requests run",
    "the copy into a slot itself takes no time worth counting",
    source="Little 1961; Sheng et al., S-LoRA, MLSys 2024",
)
def by_slots(treatment: Point, baseline: Point) -> float:
    return first_token_s(treatment) / first_token_s(baseline)


def modules(suffix: str = "") -> list[str]:
    return [f"tenant-{i}{suffix}=<adapters>/tenant-{i}{suffix}" for i in range(TENANTS)]


LORA = Variant(
    name="lora",
    flags={
        "enable-lora": True,
        "max-loras": TENANTS,
        "max-cpu-loras": 2 * TENANTS,
        "max-lora-rank": 8,
        "lora-modules": modules(),
    },
)


def serves(name: str, adapters: Adapters | None, *only: str, in_flight: int = 8) -> Workload:
    kept = adapters is not None  # an answer's text shows whose adapter wrote it
    return sends(name, 32, 16, *users(in_flight), adapters=adapters, keep_text=kept, only=only)


def on_random_weights(lab: Lab) -> Lab:
    """Serve adapters of true size; random ones write no mark, so no leak could be seen."""
    return lab.model_copy(update={"answers": ("SA-2", "SA-3")})


RATE, TPOT, TTFT = "output_tokens_per_s", "tpot_mean_s", "ttft_mean_s"

LAB = Lab(
    name="multi-lora",
    answers=("SA-2", "SA-3", "SA-4"),
    variants=(
        Variant(name="base"),
        LORA,
        LORA.but("slots-2", {"max-loras": 2}),
        LORA.but("rank-64", {"max-lora-rank": 64, "lora-modules": modules("-rank-64")}),
    ),
    flags={
        "max-model-len": 512,
        "enable-prefix-caching": True,  # where a leak between tenants could hide
        "block-size": 32,  # a CPU's default of 128 would hold none of these prompts
        "enforce-eager": True,
        "kv-cache-memory-bytes": 256 * 2**20,
    },
    workloads=(
        serves("none", None, "base", "lora"),
        serves("one", Adapters(count=1), "lora"),
        serves("uniform-2", Adapters(count=2), "lora"),
        serves("uniform-4", Adapters(count=4), "lora"),
        serves("uniform-8", Adapters(count=8), "lora", "slots-2"),
        serves("zipf-8", Adapters(count=8, mix="zipf"), "lora", "slots-2"),
        serves("rank-8", Adapters(count=2), "lora", in_flight=2),
        serves("rank-64", Adapters(count=2, suffix="-rank-64"), "rank-64", in_flight=2),
    ),
    claims=(
        unchanged(
            "ready",
            TPOT,
            "lora / base",
            "none",
            by=longer_by_bytes,
            coupled="an engine that serves adapters is told of them by several flags",
        ),
        falls(
            "one",
            RATE,
            "lora / base",
            "one / none",
            by=by_bytes,
            coupled="an adapter is asked for by its name, from an engine that was told of it",
        ),
        unchanged("eight", TPOT, "lora", "uniform-8 / one", by=longer_by_bytes),
        rises(
            "rank",
            TPOT,
            "rank-64 / lora",
            "rank-64 / rank-8",
            by=longer_by_bytes,
            coupled="adapters of another rank have other names, and the engine is told of the"
            " largest",
        ),
        rises("swap", TTFT, "slots-2 / lora", "uniform-8", by=by_slots),
        falls("skew", TTFT, "slots-2", "zipf-8 / uniform-8", by=by_slots),
    ),
    evidence=(
        *echoes(metrics.LORA, "max_lora", {"lora": "8", "slots-2": "2", "rank-64": "8"}),
        counter(metrics.LORA, "absent", "base"),
    ),
    probes=("tenants",),
    probed=("lora",),
    findings=("tenant-leaks", "adapter-cost", "tenant-memory"),
    plots=("adapters",),
    needs_text=("tenants", "tenants-quick", "tenant-leaks"),
    slo=SLO(ttft_s=1, tpot_s=0.2),
    requests=512,
    warmup_s=0.8,
    window_s=2.5,
    dummy=on_random_weights,
)
