"""A single stream: what is asked of it. Its words stand in page.md, its sizes in sizes.toml."""

from __future__ import annotations

from collections.abc import Callable

from labs.harness.spec import theory
from labs.harness.spec.declare import (
    counter,
    echoes,
    forecast,
    predicts,
    rises,
    sends,
    unchanged,
    users,
    variants,
)
from labs.harness.spec.lab import SLO, Lab, Point, PredictEffect
from labs.harness.spec.theory import PYTORCH_2, ROOFLINE
from serving import metrics

# of a layer: norm, QKV, rotary, cache write, attention, output, norm, gate and up, gating, down
OPERATIONS, FUSED_OPERATIONS = 10, 7  # fused: two norms and the gating join their neighbours
# to launch one: from Python, from the code that a compiler wrote, within a CUDA graph
EAGER_S, COMPILED_S, GRAPH_S = 10e-6, 5e-6, 1.5e-6
SCHEDULING_S = 1e-3  # of a step: choosing requests and preparing their inputs, in Python


def least_s(point: Point) -> float:
    """Return the least time of a decode step, or of the prefill where one token is asked for."""
    return theory.first_token_of(point) if point.output_tokens == 1 else theory.step_of(point)


@predicts(
    "max(bytes / bandwidth, FLOP / rate)",
    "reading and computing overlap perfectly",
    "no launch, scheduling or sampling cost",
    source=ROOFLINE,
    kind="floor",
)
def floor(point: Point) -> float:
    return least_s(point)


def longer_by(added_s: Callable[[Point], float], formula: str, assumption: str) -> PredictEffect:
    """Predict (the roofline's time + what a variant adds) / the roofline's time."""

    @predicts(
        f"(t + {formula}) / t, t = max(bytes / bandwidth, FLOP / rate)",
        assumption,
        "with the defaults nothing is added to t",
        source=PYTORCH_2,
    )
    def predict(without: Point, default: Point) -> float:
        return 1 + added_s(default) / least_s(default)

    return predict


def launching(operations: int, each_s: float, how: str) -> PredictEffect:
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

default, eager = variants("enforce-eager", default=False, eager=True)
ONE = users(1)

LAB = Lab(
    name="single-stream",
    answers=("IP-1", "KO-2"),
    variants=(
        default,
        eager,
        default.but("no-graphs", {"compilation-config": {"cudagraph_mode": "NONE"}}),
        default.but(
            "no-fusion", {"compilation-config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}}
        ),
        default.but("in-turn", {"async-scheduling": False}),
        default.but("triton", {"attention-backend": "TRITON_ATTN"}),
    ),
    flags={
        "max-model-len": 1024,
        "enable-prefix-caching": False,
        "kv-cache-memory-bytes": 256 * 2**20,
    },
    workloads=(sends("decode", 32, 48, *ONE), sends("prefill", 896, 1, *ONE)),
    claims=(
        rises("eager", "tpot_mean_s", "eager / default", "decode", by=launched_eagerly),
        unchanged(
            "eager-prefill", "ttft_mean_s", "eager / default", "prefill", by=launched_eagerly
        ),
        rises("no-graphs", "tpot_mean_s", "no-graphs / default", "decode", by=launched_singly),
        unchanged("no-fusion", "tpot_mean_s", "no-fusion / default", "decode", by=unfused),
        rises("in-turn", "tpot_mean_s", "in-turn / default", "decode", by=scheduled_in_turn),
        unchanged("triton", "tpot_mean_s", "triton / default", "decode", by=nothing_added),
    ),
    forecasts=(
        forecast("tpot", "tpot_mean_s", floor, workload="decode"),
        forecast("ttft", "ttft_mean_s", floor, workload="prefill"),
    ),
    evidence=(
        counter(metrics.PREEMPTIONS, "stays"),
        *echoes(metrics.ENGINE_CONFIG, "enforce_eager", {"default": "False", "eager": "True"}),
        *echoes(metrics.ENGINE_CONFIG, "cudagraph_mode", {"no-graphs": "NONE"}),
        *echoes(metrics.ENGINE_CONFIG, "compilation_mode", {"no-fusion": "NONE"}),
        *echoes(metrics.ENGINE_CONFIG, "enforce_eager", {"in-turn": "False", "triton": "False"}),
    ),
    findings=("phases", "flags"),
    plots=("variants",),
    slo=SLO(ttft_s=2, tpot_s=0.1),
    requests=64,
    warmup_s=1,
    window_s=8.2,
)
