"""What fewer bits buy in memory and speed, and what they cost in quality."""

from __future__ import annotations

import math
from dataclasses import dataclass

from scipy import stats

from labs.filing.results import Finding
from labs.findings.context import Context
from labs.judging.evaluation import Answers
from labs.judging.quality import SOURCES, QualityFigure, compare, gate, over_clusters
from labs.judging.text import number


def asked(context: Context, variant: str) -> list[Answers]:
    probe = context.folder.probed("quality", variant)
    return [Answers.model_validate(a) for a in probe["answers"]] if probe else []


def compared(context: Context) -> dict[str, list[QualityFigure]]:
    """Variant -> its figures against the first variant's."""
    base = asked(context, context.lab.variants[0].name)
    return {
        v.name: compare(base[0], answers[0])
        for v in context.lab.variants[1:]
        if base and (answers := asked(context, v.name))
    }


def quality(context: Context) -> Finding:
    """Every variant against the first, with the gate of ME-2 and its false alarms."""
    base_name = context.lab.variants[0].name
    base, found = asked(context, base_name), compared(context)
    if not base or not found:
        return Finding(title="Quality", lines=["Not asked: the probe did not run."])
    again = compare(base[0], base[1]) if len(base) > 1 else None
    columns = {**({f"{base_name} again": again} if again else {}), **found}
    first = next(iter(found.values()))
    overall = [f for f in first if f.where in ("", "baseline")]
    rows = [["Figure", f"`{base_name}`", *(f"`{name}`" for name in columns)]]
    for figure in overall:
        if figure.where == "baseline":
            rows.append(_level_row(figure, columns))
        else:
            unit = "" if figure.unit == "1" else f", {figure.unit}"
            rows.append([figure.name.replace("_", " ") + unit, "", *(
                _with_interval(_same(figure, figures)) for figures in columns.values()
            )])  # fmt: skip
    rows.append(["**gate**", "", *(f"**{gate(f)[0]}**" for f in columns.values())])
    lines = [
        f"`{name}`: {gate(figures)[0]}; "
        + ", ".join(f"{v.figure.name.replace('_', ' ')} {v.outcome}" for v in gate(figures)[1])
        + "."
        for name, figures in columns.items()
    ]
    n = {f.name: f.n for f in first if f.where == ""}
    lines.append(
        f"Asked on the served engine: {n['perplexity_ratio']:,} tokens of held-out text scored,"
        f" {n['needle_retrieval_difference']} needles and {n['task_accuracy_difference']} tasks."
        " Sources: "
        + ", ".join(
            f"{name.replace('_', ' ')} ({source.replace(';', ',')})"
            for name, source in SOURCES.items()
            if name != "perplexity_ratio"
        )
        + "."
    )
    lines.append(
        "The gate passes when the whole interval keeps a margin (perplexity at most 2 % up, needles"
        " and tasks at most 5 points down), fails when the whole interval breaks it, and is"
        " undecided in between. Intervals are of 95 %, over passages or questions, paired."
        + (
            f" `{base_name} again` is the same engine asked twice: its own false alarms."
            if again
            else ""
        )
    )
    return Finding(title="Quality", rows=rows, lines=lines)


def _same(figure: QualityFigure, figures: list[QualityFigure]) -> QualityFigure:
    return next(f for f in figures if (f.name, f.where) == (figure.name, figure.where))


def _with_interval(figure: QualityFigure) -> str:
    if figure.low is None or figure.high is None:
        return f"{figure.value:.3g}"
    return f"{figure.value:.3g} ({figure.low:.3g} to {figure.high:.3g})"


def _level_row(figure: QualityFigure, columns: dict[str, list[QualityFigure]]) -> list[str]:
    treated = [
        next(f for f in figures if (f.name, f.where) == (figure.name, "treatment"))
        for figures in columns.values()
    ]
    cells = [f"{f.value:.3g}" for f in treated]
    return [figure.name.replace("_", " "), f"{figure.value:.3g}", *cells]


def needles(context: Context) -> Finding:
    """Retrieval by length and depth: the change of the share found."""
    found = compared(context)
    if not found:
        return Finding(title="Needles by length and depth", lines=["Not asked."])
    names = list(found)
    places = [f for f in found[names[0]] if f.name == "needle_retrieval_difference" and f.where]
    rows = [["Where", *(f"`{n}`" for n in names)]]
    rows += [[p.where, *(_with_interval(_same(p, found[n])) for n in names)] for p in places]
    return Finding(
        title="Needles by length and depth",
        rows=rows,
        lines=["The change of the share of needles found, against the first variant."],
    )


def preemption(context: Context) -> Finding:
    """From which concurrency on the engine throws running requests' caches away."""
    rows = [["Variant", "KV capacity", "In flight", "Requests in decode", "Preemptions a trial",
             "Output throughput"]]  # fmt: skip
    onset: dict[str, list[tuple[int, float]]] = {}
    lines = []
    mine = [p for p in context.points if p.workload.name == "growing"]
    for point in mine:
        thrown = context.mean(point, "preemptions")
        capacity = context.mean(point, "kv_capacity_tokens")
        if thrown is None:
            continue
        onset.setdefault(point.variant.name, []).append((point.load.users, thrown))
        rows.append(
            [
                point.variant.name,
                number(capacity, "tok"),
                str(point.load.users),
                number(context.mean(point, "batch")),
                number(thrown),
                number(context.mean(point, "output_tokens_per_s"), "tok/s"),
            ]
        )
    for name, counts in onset.items():
        point = next(p for p in mine if p.variant.name == name)
        capacity = context.mean(point, "kv_capacity_tokens") or 0.0
        full = point.prompt_tokens + point.output_tokens
        first = next((n for n, thrown in sorted(counts) if thrown), None)
        calm = max((n for n, _ in counts if first and n < first), default=0)
        lines.append(
            f"`{name}`: {capacity:,.0f} tokens hold {capacity / full:.1f} requests at their longest"
            f" and {capacity / point.context_tokens:.1f} at their mean length, so preemption was"
            f" predicted to begin between those; there was none at {calm} in flight, and some at"
            f" {first}."
            if first
            else f"`{name}`: no preemption up to {max(n for n, _ in counts)} in flight."
        )
    return Finding(title="Where does preemption begin?", rows=rows, lines=lines)


@dataclass(frozen=True)
class Line:
    """TPOT over context, fitted: seconds, seconds a token and their standard error."""

    intercept: float
    slope: float
    error: float
    freedom: int

    @staticmethod
    def reach(error: float, freedom: int) -> float:
        """Half of the 95 % interval; infinite where as many points as parameters were fitted."""
        return error * float(stats.t.ppf(0.975, freedom)) if freedom else math.inf


def context_slope(context: Context) -> Finding:
    """TPOT as a line over the context, and where the quantized cache breaks even."""
    rows = [["Variant", "TPOT at no context", "A thousand tokens more", "95 % interval",
             "KV bytes a token"]]  # fmt: skip
    fits: dict[str, Line] = {}
    lines = []
    for variant in context.lab.variants:
        at = [
            (p.context_tokens, row["tpot_mean_s"])
            for p in context.points
            if p.variant.name == variant.name and p.workload.name in ("near", "far")
            for row in context.values.get(p.key, {}).values()
            if row.get("tpot_mean_s")
        ]
        if len({x for x, _ in at}) < 2:
            continue
        fit = stats.linregress([x for x, _ in at], [y for _, y in at])
        line = Line(float(fit.intercept), float(fit.slope), float(fit.stderr), len(at) - 2)
        fits[variant.name] = line
        reach = line.reach(line.error, line.freedom)
        low, high = (number(1000 * (line.slope + s * reach), "s") for s in (-1, 1))
        point = next(p for p in context.points if p.variant.name == variant.name)
        per_token = point.shape.kv_bytes_per_token(point.flags.kv_value_bytes)
        rows.append(
            [variant.name, number(line.intercept, "s"), number(1000 * line.slope, "s"),
             f"{low} to {high}" if line.freedom else "–", f"{per_token:,.0f}"]
        )  # fmt: skip
    base = context.lab.variants[0].name
    for name, line in fits.items():
        if name == base or base not in fits:
            continue
        plain = fits[base]
        gap, gain = line.intercept - plain.intercept, plain.slope - line.slope
        error, freedom = math.hypot(line.error, plain.error), line.freedom + plain.freedom
        text = f"`{name}`: {line.slope / plain.slope:.0%} of the slope of `{base}` (bytes say 50 %)"
        if abs(gain) <= line.reach(error, freedom):
            text += "; the repeats vary too much to tell the two slopes apart."
        elif gain <= 0:
            text += "; it never breaks even: reading less does not pay for widening here."
        elif gap <= 0:
            text += "; ahead at every context."
        else:
            text += f"; it breaks even at {gap / gain:,.0f} tokens of context."
        lines.append(text)
    lines.append(
        "A least-squares line through the two contexts' repeats, four sequences in the batch; the"
        " published GPU figures for FP8 are 54 % of the slope and a break-even at 7,010 tokens"
        " (vLLM, April 2026)."
    )
    return Finding(title="TPOT over context", rows=rows, lines=lines)


def memory_ladder(context: Context) -> Finding:
    """KV-7: out of memory on long prompts. Each step's largest prompt, and its price."""
    points = {p.variant.name: p for p in context.points}
    plain, tight = points.get("bf16"), points.get("bf16-tight")
    if plain is None or tight is None:
        return Finding(title="Out of memory on long prompts: in which order?")
    memory = tight.flags.kv_cache_memory_bytes
    per_token = plain.shape.kv_bytes_per_token()
    capacity = context.mean(tight, "kv_capacity_tokens") or memory / per_token
    eight = points.get("fp8-tight")
    twice = (eight and context.mean(eight, "kv_capacity_tokens")) or 2 * capacity
    freed = 0.75 * (plain.shape.weight_bytes - 2 * plain.shape.head_params)
    quarter_gib = 256 * 2**20
    price = _price(context)
    rows = [
        ["Step", "Largest prompt", "Price", "Known from"],
        ["as it is", f"{capacity:,.0f} tokens", "–", "measured"],
        ["lower `max-model-len`", f"{capacity:,.0f} tokens",
         "longer prompts are refused at once, not in mid-flight", "engine's own check"],
        ["lower `max-num-seqs` to 1", f"{capacity:,.0f} tokens",
         "one request at a time: the whole cache is one prompt's", "arithmetic"],
        ["FP8 KV cache", f"{twice:,.0f} tokens", price, "measured"],
        ["and 4-bit weights", f"{twice + freed / (per_token / 2):,.0f} tokens",
         "see the weight-quantization lab",
         "arithmetic: ¾ of the bytes of all weights but the output head become cache"],
        ["and 256 MiB of offload", f"{twice + (freed + quarter_gib) / (per_token / 2):,.0f} tokens",
         "every step copies what was moved out back in", "arithmetic, not run"],
    ]  # fmt: skip
    lines = [
        f"For {memory / 2**20:.0f} MiB of KV memory and {per_token:,.0f} bytes a token in BF16. The"
        " first two steps cost nothing but honesty; the next ones cost quality or time, least"
        f" first. The model itself ends at {plain.shape.max_positions:,} positions.",
    ]
    return Finding(title="Out of memory on long prompts: in which order?", rows=rows, lines=lines)


def _price(context: Context) -> str:
    """Of the FP8 cache: perplexity and TPOT over the long context, where both were measured."""
    parts = []
    if (figures := compared(context).get("fp8")) is not None:
        ratio = next(f for f in figures if f.name == "perplexity_ratio")
        parts.append(f"perplexity {ratio.value - 1:+.1%}")
    far = {p.variant.name: p for p in context.points if p.workload.name == "far"}
    both = [context.mean(far[n], "tpot_mean_s") if n in far else None for n in ("fp8", "bf16")]
    if both[0] and both[1]:
        parts.append(f"TPOT {both[0] / both[1] - 1:+.0%} over a long context")
    return ", ".join(parts) or "–"


def weights_table(context: Context) -> Finding:
    """Bytes, speed, the bound by bytes and the making of every kind of weights."""
    plain = context.points[0]
    prefill = next((p for p in context.points if p.workload.name == "prefill"), None)
    many = max(p.load.users for p in context.points if p.workload.name == "decode")
    rows = [["Weights", "In memory", "Bytes ratio", "TPOT, one stream", "Speed-up", "By bytes",
             *([f"Throughput, {many} in flight"] if many > 1 else []),
             *(["Prefill"] if prefill else []), "Made by"]]  # fmt: skip

    def at(variant: str, workload: str, users: int, metric: str) -> float | None:
        point = context.point(variant, workload, f"concurrent:{users}")
        return context.mean(point, metric) if point else None

    plain_s = at(plain.variant.name, "decode", 1, "tpot_mean_s")
    for variant in context.lab.variants:
        point = next(p for p in context.points if p.variant.name == variant.name)
        tpot_s = at(variant.name, "decode", 1, "tpot_mean_s")
        ttft_s = at(variant.name, "prefill", 1, "ttft_mean_s")
        ratio = plain.shape.weight_bytes / point.shape.weight_bytes
        row = [
            f"`{variant.name}`",
            f"{point.shape.weight_bytes / 1e6:,.0f} MB",
            f"{1 / ratio:.2f}",
            number(tpot_s, "s"),
            f"{plain_s / tpot_s:.2f}x" if plain_s and tpot_s else "–",
            f"{ratio:.2f}x",
        ]
        if many > 1:
            row.append(number(at(variant.name, "decode", many, "output_tokens_per_s"), "tok/s"))
        if prefill:
            row.append(f"{prefill.prompt_tokens / ttft_s:,.0f} tok/s" if ttft_s else "–")
        rows.append([*row, _maker(context, variant.weights)])
    lines = [
        "*By bytes* is what decode would gain at one stream if reading weights were all it did. On"
        " an accelerator fewer bytes are fewer microseconds; where unpacking 4-bit weights costs"
        " arithmetic on every step, as on a CPU, W4 saves memory and not time, and INT8, for which"
        " it has instructions, wins."
    ]
    return Finding(title="What the weights weigh, and how fast they are", rows=rows, lines=lines)


def _maker(context: Context, weights: str) -> str:
    about = context.run.about.get(weights, {})
    if "tool" not in about:
        return "–"
    text = f"{about['tool']} {about['tool_version']}, {about['seconds']:.0f} s"
    return f"{text}, {about['calibration']}" if about.get("calibration") else text


INPUTS = {
    "q_proj": "attention's input", "o_proj": "attention's output", "gate_proj": "MLP's input",
    "down_proj": "MLP's middle",
}  # fmt: skip


def outliers(context: Context) -> Finding:
    """CO-2: which activations are outliers, and what 8-bit rounding makes of them."""
    about = context.run.about.get("outliers", {})
    if "loss_nats" not in about:
        return Finding(title="What is the outlier problem?", lines=["Not studied."])
    sizes, plain = about["passages_tokens"], about["loss_nats"]["none"]
    rows = [["Rounded to 8 bits", "Perplexity", "Ratio to none rounded", "95 % interval"]]
    ratios: dict[str, float] = {}
    for name, nats in about["loss_nats"].items():
        lost = over_clusters([n - p for n, p in zip(nats, plain, strict=True)], sizes)
        ratios[name] = math.exp(lost.value)
        row = [name, f"{math.exp(sum(nats) / sum(sizes)):.2f}"]
        if lost.low is not None and lost.high is not None and name != "none":
            row += [f"{ratios[name]:.3f}", f"{math.exp(lost.low):.3f} to {math.exp(lost.high):.3f}"]
        rows.append([*row, "–", "–"][:4])
    seen = "; ".join(
        f"{title}: {inputs['largest_over_median_max']:,.0f} times the median channel, kurtosis"
        f" {inputs['kurtosis_mean']:,.0f} on average and {inputs['kurtosis_max']:,.0f} at most"
        for kind, title in INPUTS.items()
        if (inputs := about["inputs"].get(kind))
    )
    tensor, smooth, token = (
        ratios[f"activations by {how}, weights by channel"]
        for how in ("tensor", "tensor, smoothed", "token")
    )
    lines = [
        f"The largest channel of what enters the linear layers, in the worst layer: {seen}. A"
        " normal distribution has kurtosis 3.",
        f"One scale for a whole tensor multiplies perplexity by {tensor:.2f}; dividing the channels"
        f" by their sizes first (SmoothQuant) by {smooth:.2f}; a scale for each token, which the"
        f" served W8A8 has, by {token:.3f}.",
        "Simulated in float32 on the model itself, on the held-out text, a third of it for the"
        " scales; intervals are paired over passages. The quality of what is served is below.",
    ]
    return Finding(title="What is the outlier problem?", rows=rows, lines=lines)


TOOLS = (
    ("gptqmodel", "auto-gptq", "GPTQ: GPTQModel, the heir, against AutoGPTQ"),
    ("w4a16-gptq", "auto-gptq", "GPTQ: llm-compressor against AutoGPTQ"),
    ("w4a16-awq", "autoawq", "AWQ: llm-compressor against AutoAWQ"),
    ("w4a16-awq", "w4a16-gptq", "One tool: AWQ against GPTQ"),
    ("w4a16-gptq", "w4a16-rtn", "One tool: GPTQ against rounding to nearest"),
    ("w4a16-awq", "w4a16-rtn", "One tool: AWQ, with zero points, against rounding to nearest"),
    ("w4a16-gptq-code", "w4a16-gptq", "One tool: calibrated on code against on prose"),
)


def tools(context: Context) -> Finding:
    """Tool against tool, and text against text, on the same passages and questions."""
    rows = [["Compared", "Perplexity ratio", "Top-1 agreement", "Needles", "Tasks"]]
    lines = []
    for one, other, title in TOOLS:
        ours, theirs = asked(context, one), asked(context, other)
        if not ours or not theirs:
            continue
        found = {f.name: f for f in compare(theirs[0], ours[0]) if f.where == ""}
        ratio = found["perplexity_ratio"]
        names = ("perplexity_ratio", "top1_agreement", "needle_retrieval_difference",
                 "task_accuracy_difference")  # fmt: skip
        rows.append([title, *(_with_interval(found[name]) for name in names)])
        if ratio.low is not None and ratio.high is not None and not ratio.low <= 1 <= ratio.high:
            better = one if ratio.value < 1 else other
            lines.append(f"{title}: `{better}` keeps the lower perplexity.")
        else:
            lines.append(f"{title}: no difference in perplexity is shown.")
    lines.append(
        "Ratios and differences are the first against the second; intervals of 95 %, paired over"
        " passages or questions. Held-out text is prose that no tool has seen."
    )
    return Finding(title="Tool against tool, text against text", rows=rows, lines=lines)
