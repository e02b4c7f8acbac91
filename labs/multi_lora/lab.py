"""Multi-LoRA: what is asked of it. Its words stand in page.md, its sizes in sizes.toml."""

from __future__ import annotations

from labs.harness import theory
from labs.harness.spec import SLO, Arm, Claim, Evidence, Lab, Point, Prediction, Variant
from loadtests.arrivals import Concurrent
from loadtests.workload import Adapters, Fixed, Workload
from serving import metrics

TENANTS = 8
USERS = 8


def adapter_bytes(point: Point) -> float:
    """Return the bytes of an adapter at `max-lora-rank`, to which vLLM pads every adapter."""
    about = point.about["adapters"]
    rank = point.flags.max_lora_rank
    return 2 * float(about["params_per_adapter"]) * rank / float(about["rank"])


RATE, TPOT = "output_tokens_per_s", "tpot_mean_s"


def step_s(point: Point) -> float:
    """Predict a decode step: it reads weights, KV, and every adapter in the batch."""
    moved = point.kv_bytes()
    if point.workload.adapters:
        moved += adapter_bytes(point) * min(point.workload.adapters.count, point.load.users)
    return theory.forward_s(point.shape, point.ceilings, point.load.users, moved)


def by_bytes(treatment: Point, baseline: Point) -> Prediction:
    return Prediction(
        value=step_s(baseline) / step_s(treatment),
        formula="(weights + KV + active adapters) bytes, baseline / treatment",
        assumptions=("reading is all a step does: the launches to apply an adapter are free",),
        source="Chen et al., Punica, MLSys 2024; Sheng et al., S-LoRA, MLSys 2024",
    )


def longer_by_bytes(treatment: Point, baseline: Point) -> Prediction:
    faster = by_bytes(treatment, baseline)
    return faster.model_copy(update={
        "value": 1 / faster.value,
        "formula": "(weights + KV + active adapters) bytes, treatment / baseline",
    })  # fmt: skip


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
    share = running_share(point)
    answer_s = point.output_tokens * step_s(point)
    prefill_s = theory.prefill_s(point.shape, point.ceilings, point.prompt_tokens)
    return (1 / share - 1) * answer_s + prefill_s + step_s(point)


def by_slots(treatment: Point, baseline: Point) -> Prediction:
    return Prediction(
        value=first_token_s(treatment) / first_token_s(baseline),
        formula="((1 / share running - 1) L t(B) + t_prefill + t(B)), treatment / baseline",
        assumptions=(
            "a request waits while both slots hold other adapters whose requests run",
            "the copy into a slot itself takes no time worth counting",
        ),
        source="Little 1961; Sheng et al., S-LoRA, MLSys 2024",
    )


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


def workload(name: str, adapters: Adapters | None, *only: str, users: int = USERS) -> Workload:
    return Workload(
        name=name,
        prompt_tokens=Fixed(tokens=32),
        output_tokens=Fixed(tokens=16),
        adapters=adapters,
        keep_text=adapters is not None,
        only=only,
        loads=(Concurrent(users=users),),
    )


def claim(name: str, metric: str, of: Arm, against: Arm, expect: str, coupled: str = "") -> Claim:
    predict = {RATE: by_bytes, TPOT: longer_by_bytes}.get(metric, by_slots)
    return Claim.model_validate(
        {"name": name, "metric": metric, "treatment": of, "baseline": against,
         "expect": expect, "predict": predict, "coupled": coupled}
    )  # fmt: skip


def on_random_weights(lab: Lab) -> Lab:
    """Serve adapters of true size; random ones write no mark, so no leak could be seen."""
    return lab.model_copy(update={"answers": ("SA-2", "SA-3")})


ONE, ALL = Arm(variant="lora", workload="one"), Arm(variant="lora", workload="uniform-8")

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
        workload("none", None, "base", "lora"),
        workload("one", Adapters(count=1), "lora"),
        workload("uniform-2", Adapters(count=2), "lora"),
        workload("uniform-4", Adapters(count=4), "lora"),
        workload("uniform-8", Adapters(count=8), "lora", "slots-2"),
        workload("zipf-8", Adapters(count=8, mix="zipf"), "lora", "slots-2"),
        workload("rank-8", Adapters(count=2), "lora", users=2),
        workload("rank-64", Adapters(count=2, suffix="-rank-64"), "rank-64", users=2),
    ),
    claims=(
        claim("ready", TPOT, Arm(variant="lora", workload="none"),
              Arm(variant="base", workload="none"), "unchanged",
              "an engine that serves adapters is told of them by several flags"),
        claim("one", RATE, ONE, Arm(variant="base", workload="none"), "falls",
              "an adapter is asked for by its name, from an engine that was told of it"),
        claim("eight", TPOT, ALL, ONE, "unchanged"),
        claim("rank", TPOT, Arm(variant="rank-64", workload="rank-64"),
              Arm(variant="lora", workload="rank-8"), "rises",
              "adapters of another rank have other names, and the engine is told of the largest"),
        claim("swap", "ttft_mean_s", Arm(variant="slots-2", workload="uniform-8"), ALL, "rises"),
        claim("skew", "ttft_mean_s", Arm(variant="slots-2", workload="zipf-8"),
              Arm(variant="slots-2", workload="uniform-8"), "falls"),
    ),
    evidence=(
        *(
            Evidence.echo(name, metrics.LORA, "max_lora", slots)
            for name, slots in (("lora", "8"), ("slots-2", "2"), ("rank-64", "8"))
        ),
        Evidence(arm=Arm(variant="base"), kind="absent", metric=metrics.LORA),
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
)  # fmt: skip
