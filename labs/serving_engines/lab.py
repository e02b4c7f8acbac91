"""Serving engines: what is asked of them. Its words stand in page.md, its sizes in sizes.toml."""

from __future__ import annotations

from labs.harness.spec import theory
from labs.harness.spec.declare import (
    counter,
    echoes,
    falls,
    forecast,
    predicts,
    rises,
    sends,
    unchanged,
    users,
)
from labs.harness.spec.lab import SLO, Lab, Point, Variant
from labs.harness.spec.theory import ROOFLINE
from serving import metrics

ORCA = "Yu et al., Orca, OSDI 2022"
ONE, FOUR, MANY = users(1, 4, 16)


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


BARE = "no launch, scheduling or sampling cost: the same bound for every engine"


@predicts(
    "L / ((L - 1) t(B) / B + t_prefill), B = requests that the engine has at once",
    BARE,
    source=ROOFLINE,
    kind="ceiling",
)
def throughput(point: Point) -> float:
    return theory.batch_throughput(
        point.shape, point.ceilings, at_once(point), point.prompt_tokens, point.output_tokens
    )


@predicts("t(B) = max(bytes / bandwidth, FLOP / rate)", BARE, source=ROOFLINE, kind="floor")
def token_interval(point: Point) -> float:
    return theory.decode_step_s(point.shape, point.ceilings, at_once(point), point.context_tokens)


@predicts(
    "(users - 1) (t_prefill + (L - 1) t(1)) + t_prefill",
    "each user sends the next request as soon as an answer has come",
    source=ROOFLINE,
    kind="floor",
)
def turn_taking(point: Point) -> float:
    """Bound the TTFT where requests are served one at a time: all others come first."""
    prefill_s = theory.prefill_of(point)
    step_s = theory.decode_step_s(point.shape, point.ceilings, 1, point.context_tokens)
    each_s = prefill_s + (point.output_tokens - 1) * step_s
    return (point.load.users - 1) * each_s + prefill_s


@predicts(
    "roofline throughput of the requests at once / of one",
    "the costs that the roofline leaves out do not grow with the batch",
    source=ORCA,
)
def batching_gain(many: Point, one: Point) -> float:
    return throughput(many).value / throughput(one).value


@predicts(
    "1: every engine reads the same weights for a token",
    "reading them is all that a step does",
    source=ROOFLINE,
)
def same_step(treatment: Point, baseline: Point) -> float:
    return token_interval(treatment).value / token_interval(baseline).value


BY_BYTES = predicts(
    "max((weight + KV bytes) / bandwidth, FLOP / rate), in 4 bits / in 16",
    "unpacking weights is free",
    source=ROOFLINE,
)


@BY_BYTES
def step_by_bytes(four: Point, sixteen: Point) -> float:
    return token_interval(four).value / token_interval(sixteen).value


@BY_BYTES
def throughput_by_bytes(four: Point, sixteen: Point) -> float:
    return throughput(four).value / throughput(sixteen).value


@predicts(
    "roofline throughput of the engine that batches / of one request at a time",
    "the costs that the roofline leaves out are the same in both engines",
    source=ORCA,
)
def versus_turns(batching: Point, one_by_one: Point) -> float:
    return throughput(batching).value / throughput(one_by_one).value


VLLM = Variant(name="vllm")  # compiled, as it starts by default
EAGER = VLLM.but("vllm-eager", {"enforce-eager": True})  # as the other labs start it on a CPU
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
    flags={"parallel": 16, "ctx-size": 16 * 512},
)
LLAMA_Q4 = LLAMA.but("llama-cpp-q4", weights="gguf-q4")
OTHERS = (TURNS, BATCHES, LLAMA)


def on_random_weights(lab: Lab) -> Lab:
    """Leave vLLM alone: it draws random weights itself, and the others read theirs from files."""
    reason = "its engine reads weights from files, and random ones are drawn in vLLM itself"
    turned = tuple(knob for knob in lab.next_knobs if "llama-cpp" not in knob)
    alone = lab.without({v.name: reason for v in (*OTHERS, LLAMA_Q4)})
    return alone.model_copy(update={"answers": ("SO-7",), "next_knobs": turned})


MANY_TO_ONE = f"{MANY} / {ONE}"
RATE, TPOT = "output_tokens_per_s", "tpot_mean_s"

LAB = Lab(
    name="serving-engines",
    answers=("SO-7", "CO-7"),
    variants=(VLLM, EAGER, *OTHERS, LLAMA_Q4),
    flags={
        "max-model-len": 512,
        "max-num-seqs": 16,
        "enable-prefix-caching": False,
        "enforce-eager": False,
        "kv-cache-memory-bytes": 256 * 2**20,
    },
    workloads=(sends("chat", 32, 12, ONE, FOUR, MANY, keep_text=True),),
    claims=(
        *(
            rises(f"batches-{v.name}", RATE, v.name, load=MANY_TO_ONE, by=batching_gain)
            for v in (VLLM, BATCHES, LLAMA)
        ),
        unchanged("turns", RATE, "transformers", load=MANY_TO_ONE, by=batching_gain),
        rises("load", RATE, "vllm / transformers", load=MANY, by=versus_turns),
        *(
            unchanged(f"alone-{v.name}", TPOT, f"{v.name} / vllm", load=ONE, by=same_step)
            for v in (EAGER, *OTHERS)
        ),
        falls("q4-one", TPOT, "llama-cpp-q4 / llama-cpp", load=ONE, by=step_by_bytes),
        rises("q4-many", RATE, "llama-cpp-q4 / llama-cpp", load=MANY, by=throughput_by_bytes),
    ),
    forecasts=(
        forecast("throughput", RATE, throughput),
        forecast("tpot", TPOT, token_interval),
        forecast("turn-taking", "ttft_mean_s", turn_taking, "transformers", load=MANY),
    ),
    evidence=(
        *echoes(metrics.CACHE_CONFIG, "enable_prefix_caching", {"vllm": "False"}),
        *echoes(
            metrics.ENGINE_CONFIG,
            "enforce_eager",
            dict.fromkeys((VLLM.name, EAGER.name), "--enforce-eager"),
        ),
        counter(metrics.PREEMPTIONS, "stays", "vllm"),
        *(counter(metrics.GENERATION_TOKENS, "rises", v.name) for v in (LLAMA, LLAMA_Q4)),
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
