"""A single stream: how near does the engine come to the machine, and which of its flags matter?

One request alone goes through two phases. *Prefill* multiplies its whole prompt with the weights at
once, thousands of products for each weight it reads: arithmetic is the limit. *Decode* reads every
weight again for each single token: memory bandwidth is. What a step takes beyond that is the
engine's own: an operation launched from Python takes microseconds, whatever its size, and there are
hundreds in a step. *Compiling* the model (Ansel et al., ASPLOS 2024) fuses the small ones, and on a
GPU a *CUDA graph* launches what is left as one. Large operations hide that cost, small ones do not:
decode gains, a long prompt hardly.

The variants take one thing each away from the engine's defaults; on a GPU also asynchronous
scheduling and the attention kernels.

Turn: the context (`workloads.decode.prompt_tokens.tokens`), the long prompt
(`workloads.prefill.prompt_tokens.tokens`), a flag (`variants.eager.flags`).
"""

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
EAGER = Variant(name="eager", flags={"enforce-eager": True})
ON_A_GPU = (
    DEFAULT,
    EAGER,
    DEFAULT.but("no-graphs", {"compilation-config": {"cudagraph_mode": "NONE"}}),
    DEFAULT.but(
        "no-fusion", {"compilation-config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}}
    ),
    DEFAULT.but("in-turn", {"async-scheduling": False}),
    DEFAULT.but("triton", {"attention-backend": "TRITON_ATTN"}),
)


def claim(
    name: str,
    title: str,
    variant: str,
    expect: str,
    predict: Callable[[Point, Point], Prediction],
    workload: str = "decode",
) -> Claim:
    return Claim.model_validate(
        {
            "name": name,
            "title": title,
            "metric": "tpot_mean_s" if workload == "decode" else "ttft_mean_s",
            "treatment": {"variant": variant, "workload": workload},
            "baseline": {"variant": "default", "workload": workload},
            "expect": expect,
            "predict": predict,
        }
    )


CLAIMS = (
    claim("eager", "Launching every operation for itself lengthens a decode step",
          "eager", "rises", launched_eagerly),
    claim("eager-prefill", "Launching every operation for itself hardly lengthens a long prefill",
          "eager", "unchanged", launched_eagerly, "prefill"),
)  # fmt: skip
GPU_CLAIMS = (
    *CLAIMS,
    claim("no-graphs", "Without CUDA graphs the compiled operations are launched one by one",
          "no-graphs", "rises", launched_singly),
    claim("no-fusion", "Once a graph launches them, fusing operations gains little",
          "no-fusion", "unchanged", unfused),
    claim("in-turn", "Scheduling that waits for the step before lengthens each",
          "in-turn", "rises", scheduled_in_turn),
    claim("triton", "The kernels of attention matter little at one short context",
          "triton", "unchanged", nothing_added),
)  # fmt: skip
EVIDENCE = (
    Evidence(arm=Arm(), kind="stays", metric=metrics.PREEMPTIONS),
    Evidence.echo("default", metrics.ENGINE_CONFIG, "enforce_eager", "False"),
    Evidence.echo("eager", metrics.ENGINE_CONFIG, "enforce_eager", "True"),
)

LAB = Lab(
    name="single-stream",
    title="A single stream",
    question="How fast can one request alone be on this machine, and which of the engine's flags"
    " get it there?",
    answers=("IP-1", "KO-2"),
    variants=(DEFAULT, EAGER),
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
    claims=CLAIMS,
    forecasts=(
        Forecast(name="tpot", metric="tpot_mean_s", arm=Arm(workload="decode"), predict=floor),
        Forecast(name="ttft", metric="ttft_mean_s", arm=Arm(workload="prefill"), predict=floor),
    ),
    evidence=EVIDENCE,
    findings=("phases", "flags"),
    plots=("variants",),
    slo=SLO(ttft_s=2, tpot_s=0.1),
    requests=64,
    warmup_s=1,
    window_s=8.2,
    scales={
        "gpu": {
            "flags": {
                "max-num-batched-tokens": 8192,  # a long prompt in one step
                "enable-prefix-caching": False,
            },
            "variants": [v.model_dump() for v in ON_A_GPU],
            "workloads.decode.prompt_tokens.tokens": 128,
            "workloads.decode.output_tokens.tokens": 256,
            "workloads.prefill.prompt_tokens.tokens": 4096,
            "claims": [c.model_dump() for c in GPU_CLAIMS],
            "evidence": (
                *EVIDENCE,
                Evidence.echo("no-graphs", metrics.ENGINE_CONFIG, "cudagraph_mode", "NONE"),
                Evidence.echo("no-fusion", metrics.ENGINE_CONFIG, "compilation_mode", "NONE"),
                Evidence.echo("in-turn", metrics.ENGINE_CONFIG, "enforce_eager", "False"),
                Evidence.echo("triton", metrics.ENGINE_CONFIG, "enforce_eager", "False"),
            ),
            "requests": 512,
            "warmup_s": 2,
            "window_s": 6,
            "next_knobs": (
                'SET="workloads.decode.prompt_tokens.tokens=4096" has decode read keys and values'
                " too: do the kernels of attention matter now?",
                'SET="workloads.prefill.prompt_tokens.tokens=512" shortens the long prompt: its'
                " launches weigh more, its arithmetic less",
                'SET="variants.triton.flags.attention-backend=FLASHINFER" tries other kernels',
            ),
        },
        "gpu-quick": {
            "without": ("no-fusion", "in-turn", "triton"),
            "flags.kv-cache-memory-bytes": 3 * 2**30,  # more than one stream needs of any model
            "workloads.decode.output_tokens.tokens": 96,
            "requests": 128,
            "warmup_s": 0.5,
            "window_s": 2,
        },
    },
    quick={"repeats": 1},
    limits={
        "cpu": "A CPU has no CUDA graphs and launches nothing ahead: what compiling gains here is"
        " fusion. It gains on a long prompt too: an operation that is not fused writes the"
        " activations of all the prompt's tokens to memory, and the next one reads them back. The"
        " ceilings are those of the one core that computes.",
        "gpu": "One request on one GPU. In a large batch a step is longer and its launches weigh"
        " less; the flags that matter to one stream may not matter there.",
    },
    next_knobs=(
        'SET="workloads.decode.prompt_tokens.tokens=800" has decode read keys and values too',
        'SET="workloads.prefill.prompt_tokens.tokens=112" shortens the long prompt: its launches'
        " weigh more, its arithmetic less",
        'SET="flags.block-size=32" keeps keys and values in smaller blocks',
    ),
)
