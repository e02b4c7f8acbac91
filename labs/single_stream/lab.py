"""A single stream: what is asked of it. Its words stand in page.md, its sizes in sizes.toml."""

from __future__ import annotations

from collections.abc import Callable

from labs.harness import theory
from labs.harness.spec import SLO, Arm, Claim, Evidence, Forecast, Lab, Point, Prediction, Variant
from loadtests.arrivals import Concurrent
from loadtests.workload import Fixed, Workload
from serving import metrics

# of a layer: norm, QKV, rotary, cache write, attention, output, norm, gate and up, gating, down
OPERATIONS, FUSED_OPERATIONS = 10, 7  # fused: two norms and the gating join their neighbours
# to launch one: from Python, from the code that a compiler wrote, within a CUDA graph
EAGER_S, COMPILED_S, GRAPH_S = 10e-6, 5e-6, 1.5e-6
SCHEDULING_S = 1e-3  # of a step: choosing requests and preparing their inputs, in Python


def least_s(point: Point) -> float:
    """Return the least time of a decode step, or of the prefill where one token is asked for."""
    if point.output_tokens == 1:
        return theory.prefill_left_s(point.shape, point.ceilings, point.prompt_tokens, 0)
    return theory.decode_step_s(point.shape, point.ceilings, point.load.users, point.context_tokens)


def floor(point: Point) -> Prediction:
    return Prediction(
        value=least_s(point),
        kind="floor",
        formula="max(bytes / bandwidth, FLOP / rate)",
        assumptions=(
            "reading and computing overlap perfectly",
            "no launch, scheduling or sampling cost",
        ),
        source="Williams et al., Roofline, 2009",
    )


def longer_by(
    added_s: Callable[[Point], float], formula: str, assumption: str
) -> Callable[[Point, Point], Prediction]:
    """Predict (the roofline's time + what a variant adds) / the roofline's time."""

    def predict(without: Point, default: Point) -> Prediction:
        share = added_s(default) / least_s(default)
        return Prediction(
            value=1 + share,
            formula=f"(t + {formula}) / t, t = max(bytes / bandwidth, FLOP / rate)",
            assumptions=(assumption, "with the defaults nothing is added to t"),
            source="Ansel et al., PyTorch 2, ASPLOS 2024",
        )

    return predict


def launching(operations: int, each_s: float, how: str) -> Callable[[Point, Point], Prediction]:
    each = f"{1e6 * each_s:g} us"
    return longer_by(
        lambda point: point.shape.layers * operations * each_s,
        f"{operations} operations a layer of {each}",
        f"an operation takes {each} to launch {how}, and none hides behind another",
    )


launched_eagerly = launching(OPERATIONS, EAGER_S, "from Python")
launched_singly = launching(FUSED_OPERATIONS, COMPILED_S, "from compiled code")
unfused = launching(OPERATIONS - FUSED_OPERATIONS, GRAPH_S, "within a CUDA graph")
scheduled_in_turn = longer_by(
    lambda _: SCHEDULING_S,
    f"{1e3 * SCHEDULING_S:g} ms",
    f"scheduling takes {1e3 * SCHEDULING_S:g} ms of Python a step, which is hidden by default",
)
nothing_added = longer_by(
    lambda _: 0, "0", "at one short context attention reads little, whatever its kernel"
)


DEFAULT = Variant(name="default", flags={"enforce-eager": False})
VARIANTS = (
    DEFAULT,
    Variant(name="eager", flags={"enforce-eager": True}),
    DEFAULT.but("no-graphs", {"compilation-config": {"cudagraph_mode": "NONE"}}),
    DEFAULT.but(
        "no-fusion", {"compilation-config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}}
    ),
    DEFAULT.but("in-turn", {"async-scheduling": False}),
    DEFAULT.but("triton", {"attention-backend": "TRITON_ATTN"}),
)


def claim(
    name: str,
    expect: str,
    predict: Callable[[Point, Point], Prediction],
    variant: str = "",
    workload: str = "decode",
) -> Claim:
    return Claim.model_validate(
        {
            "name": name,
            "metric": "tpot_mean_s" if workload == "decode" else "ttft_mean_s",
            "treatment": {"variant": variant or name, "workload": workload},
            "baseline": {"variant": "default", "workload": workload},
            "expect": expect,
            "predict": predict,
        }
    )


LAB = Lab(
    name="single-stream",
    answers=("IP-1", "KO-2"),
    variants=VARIANTS,
    flags={
        "max-model-len": 1024,
        "enable-prefix-caching": False,
        "kv-cache-memory-bytes": 256 * 2**20,
    },
    workloads=(
        Workload(
            name="decode",
            prompt_tokens=Fixed(tokens=32),
            output_tokens=Fixed(tokens=48),
            loads=(Concurrent(users=1),),
        ),
        Workload(
            name="prefill",
            prompt_tokens=Fixed(tokens=896),
            output_tokens=Fixed(tokens=1),
            loads=(Concurrent(users=1),),
        ),
    ),
    claims=(
        claim("eager", "rises", launched_eagerly),
        claim("eager-prefill", "unchanged", launched_eagerly, "eager", "prefill"),
        claim("no-graphs", "rises", launched_singly),
        claim("no-fusion", "unchanged", unfused),
        claim("in-turn", "rises", scheduled_in_turn),
        claim("triton", "unchanged", nothing_added),
    ),
    forecasts=(
        Forecast(name="tpot", metric="tpot_mean_s", arm=Arm(workload="decode"), predict=floor),
        Forecast(name="ttft", metric="ttft_mean_s", arm=Arm(workload="prefill"), predict=floor),
    ),
    evidence=(
        Evidence(arm=Arm(), kind="stays", metric=metrics.PREEMPTIONS),
        Evidence.echo("default", metrics.ENGINE_CONFIG, "enforce_eager", "False"),
        Evidence.echo("eager", metrics.ENGINE_CONFIG, "enforce_eager", "True"),
        Evidence.echo("no-graphs", metrics.ENGINE_CONFIG, "cudagraph_mode", "NONE"),
        Evidence.echo("no-fusion", metrics.ENGINE_CONFIG, "compilation_mode", "NONE"),
        Evidence.echo("in-turn", metrics.ENGINE_CONFIG, "enforce_eager", "False"),
        Evidence.echo("triton", metrics.ENGINE_CONFIG, "enforce_eager", "False"),
    ),
    findings=("phases", "flags"),
    plots=("variants",),
    slo=SLO(ttft_s=2, tpot_s=0.1),
    requests=64,
    warmup_s=1,
    window_s=8.2,
)
