"""Serving engines: what is asked of them. Its words stand in page.md, its sizes in sizes.toml."""

from __future__ import annotations

from labs.harness import theory
from labs.harness.spec import SLO, Arm, Claim, Evidence, Forecast, Lab, Point, Prediction, Variant
from loadtests.arrivals import Concurrent
from loadtests.workload import Fixed, Workload
from serving import metrics

ORCA = "Yu et al., Orca, OSDI 2022"
ROOFLINE = "Williams et al., Roofline, 2009"
ONE, MANY = "concurrent:1", "concurrent:16"
USERS = tuple(Concurrent(users=n) for n in (1, 4, 16))


def at_once(point: Point) -> int:
    """Return how many requests the engine has in one step, at most: its batch."""
    flags, users = point.flags, point.load.users
    match point.variant.engine:
        case "transformers":
            return users if flags.get("continuous-batching") else 1
        case "llama-cpp":
            return min(users, flags.integer("parallel", 1))
        case _:
            return flags.at_once(users)


def throughput(point: Point) -> Prediction:
    return Prediction(
        value=theory.batch_throughput(
            point.shape, point.ceilings, at_once(point), point.prompt_tokens, point.output_tokens
        ),
        kind="ceiling",
        formula="L / ((L - 1) t(B) / B + t_prefill), B = requests that the engine has at once",
        assumptions=("no launch, scheduling or sampling cost: the same bound for every engine",),
        source=ROOFLINE,
    )


def token_interval(point: Point) -> Prediction:
    return Prediction(
        value=theory.decode_step_s(
            point.shape, point.ceilings, at_once(point), point.context_tokens
        ),
        kind="floor",
        formula="t(B) = max(bytes / bandwidth, FLOP / rate)",
        assumptions=("no launch, scheduling or sampling cost: the same bound for every engine",),
        source=ROOFLINE,
    )


def turn_taking(point: Point) -> Prediction:
    """Bound the TTFT where requests are served one at a time: all others come first."""
    prefill_s = theory.prefill_s(point.shape, point.ceilings, point.prompt_tokens)
    step_s = theory.decode_step_s(point.shape, point.ceilings, 1, point.context_tokens)
    each_s = prefill_s + (point.output_tokens - 1) * step_s
    return Prediction(
        value=(point.load.users - 1) * each_s + prefill_s,
        kind="floor",
        formula="(users - 1) (t_prefill + (L - 1) t(1)) + t_prefill",
        assumptions=("each user sends the next request as soon as an answer has come",),
        source=ROOFLINE,
    )


def batching_gain(many: Point, one: Point) -> Prediction:
    return Prediction(
        value=throughput(many).value / throughput(one).value,
        formula="roofline throughput of the requests at once / of one",
        assumptions=("the costs that the roofline leaves out do not grow with the batch",),
        source=ORCA,
    )


def same_step(treatment: Point, baseline: Point) -> Prediction:
    return Prediction(
        value=token_interval(treatment).value / token_interval(baseline).value,
        formula="1: every engine reads the same weights for a token",
        assumptions=("reading them is all that a step does",),
        source=ROOFLINE,
    )


def versus_turns(batching: Point, one_by_one: Point) -> Prediction:
    return Prediction(
        value=throughput(batching).value / throughput(one_by_one).value,
        formula="roofline throughput of the engine that batches / of one request at a time",
        assumptions=("the costs that the roofline leaves out are the same in both engines",),
        source=ORCA,
    )


VLLM = Variant(name="vllm")
TURNS = Variant(name="transformers", engine="transformers")
BATCHES = TURNS.but(
    "transformers-cb",
    {
        "continuous-batching": True,
        "cb-block-size": 32,
        "cb-num-blocks": 256,  # or it would take nine tenths of the memory
        "cb-max-batch-tokens": 256,
    },
)
LLAMA = Variant(
    name="llama-cpp",
    engine="llama-cpp",
    flags={"model": "<gguf>/model.gguf", "parallel": 16, "ctx-size": 16 * 512},
)
OTHERS = (TURNS, BATCHES, LLAMA)


def on_random_weights(lab: Lab) -> Lab:
    """Leave vLLM alone: it draws random weights itself, and the others read theirs from files."""
    reason = "its engine reads weights from files, and random ones are drawn in vLLM itself"
    turned = tuple(knob for knob in lab.next_knobs if "llama-cpp" not in knob)
    alone = lab.without({v.name: reason for v in OTHERS})
    return alone.model_copy(update={"next_knobs": turned})


LAB = Lab(
    name="serving-engines",
    answers=("SO-7",),
    variants=(VLLM, *OTHERS),
    flags={
        "max-model-len": 512,
        "max-num-seqs": 16,
        "enable-prefix-caching": False,
        "enforce-eager": True,
        "kv-cache-memory-bytes": 256 * 2**20,
    },
    workloads=(
        Workload(
            name="chat",
            prompt_tokens=Fixed(tokens=32),
            output_tokens=Fixed(tokens=12),
            keep_text=True,
            loads=USERS,
        ),
    ),
    claims=(
        *(
            Claim(
                name=f"batches-{variant.name}",
                metric="output_tokens_per_s",
                treatment=Arm(variant=variant.name, load=MANY),
                baseline=Arm(variant=variant.name, load=ONE),
                expect="rises",
                predict=batching_gain,
            )
            for variant in (VLLM, BATCHES, LLAMA)
        ),
        Claim(
            name="turns",
            metric="output_tokens_per_s",
            treatment=Arm(variant="transformers", load=MANY),
            baseline=Arm(variant="transformers", load=ONE),
            expect="unchanged",
            predict=batching_gain,
        ),
        Claim(
            name="load",
            metric="output_tokens_per_s",
            treatment=Arm(variant="vllm", load=MANY),
            baseline=Arm(variant="transformers", load=MANY),
            expect="rises",
            predict=versus_turns,
        ),
        *(
            Claim(
                name=f"alone-{variant.name}",
                metric="tpot_mean_s",
                treatment=Arm(variant=variant.name, load=ONE),
                baseline=Arm(variant="vllm", load=ONE),
                expect="unchanged",
                predict=same_step,
            )
            for variant in OTHERS
        ),
    ),
    forecasts=(
        Forecast(name="throughput", metric="output_tokens_per_s", arm=Arm(), predict=throughput),
        Forecast(name="tpot", metric="tpot_mean_s", arm=Arm(), predict=token_interval),
        Forecast(
            name="turn-taking",
            metric="ttft_mean_s",
            arm=Arm(variant="transformers", load=MANY),
            predict=turn_taking,
        ),
    ),
    evidence=(
        Evidence.echo("vllm", metrics.CACHE_CONFIG, "enable_prefix_caching", "False"),
        Evidence(arm=Arm(variant="vllm"), kind="stays", metric=metrics.PREEMPTIONS),
        Evidence(arm=Arm(variant="llama-cpp"), kind="rises", metric=metrics.GENERATION_TOKENS),
    ),
    findings=("curves", "same-words", "cannot"),
    needs_text=("same-words",),
    dummy=on_random_weights,
    slo=SLO(ttft_s=2, tpot_s=0.2),
    requests=256,
    warmup_s=1,
    window_s=3,
    timeout_s=180,  # one request at a time, the last of sixteen waits for the others
    repeats=3,
)
