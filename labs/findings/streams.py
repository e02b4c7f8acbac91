"""What one request alone makes of the machine, and which flags of the engine matter to it."""

from __future__ import annotations

from dataclasses import dataclass

from labs import theory
from labs.filing.results import Finding
from labs.findings.context import Context
from labs.judging.judge import effect, outcome_of
from labs.judging.metrics import by_repeat
from labs.judging.text import number, times
from labs.lab import Point

METRIC_OF = {"decode": "tpot_mean_s", "prefill": "ttft_mean_s"}
MATTERS = {"helps": "yes", "hurts": "yes", "no effect": "no", "inconclusive": "not settled"}
NOT_VALID = "not valid"


@dataclass(frozen=True)
class Phase:
    """A forward pass as it was measured: a decode step, or the prefill of a whole prompt."""

    tokens: float
    seconds: float
    flop: float
    moved_bytes: float
    point: Point

    @property
    def arithmetic(self) -> float:
        """Share of the measured BF16 rate: MFU (PaLM, Chowdhery et al. 2022)."""
        return self.flop / self.seconds / self.point.ceilings.bf16_flops_per_s

    @property
    def bandwidth(self) -> float:
        """Share of the measured memory bandwidth: MBU (Databricks 2023)."""
        return self.moved_bytes / self.seconds / self.point.ceilings.memory_bandwidth_bytes_per_s

    @property
    def bound(self) -> str:
        """What theory says limits it, by the work alone."""
        ridge = self.point.ceilings.ridge_flops_per_byte
        return "arithmetic" if self.flop / self.moved_bytes > ridge else "memory bandwidth"


def phase(context: Context, variant: str, workload: str) -> Phase | None:
    """The bytes of a pass are its weights and what is cached of the context, once each."""
    point = context.point(variant, workload, "concurrent:1")
    seconds = context.mean(point, METRIC_OF[workload]) if point else None
    if point is None or not seconds:
        return None
    shape, prompt = point.shape, point.prompt_tokens
    if workload == "prefill":
        moved = shape.step_bytes(prompt) + prompt * shape.kv_bytes_per_token()
        return Phase(prompt, seconds, theory.prefill_flops(shape, prompt), moved, point)
    at = point.context_tokens
    return Phase(
        1, seconds, theory.decode_flops(shape, 1, at), theory.decode_bytes(shape, 1, at), point
    )


def phases(context: Context) -> Finding:
    """Prefill and decode of one request by the engine's defaults: work, time, and what limits."""
    rows = [[
        "Phase", "Time of a pass", "Tokens/s", "FLOP a byte", "FLOP/s (MFU)", "Bytes/s (MBU)",
        "Bound by",
    ]]  # fmt: skip
    found = {name: p for name in METRIC_OF if (p := phase(context, "default", name))}
    for name, p in found.items():
        rows.append([
            f"{name}, {p.tokens:,.0f} token{'s' * (p.tokens > 1)}",
            number(p.seconds, "s"),
            number(p.tokens / p.seconds),
            number(p.flop / p.moved_bytes),
            f"{p.flop / p.seconds / 1e12:.3g} T ({p.arithmetic:.0%})",
            f"{p.moved_bytes / p.seconds / 1e9:.3g} G ({p.bandwidth:.0%})",
            p.bound,
        ])  # fmt: skip
    lines = []
    if len(found) == len(METRIC_OF):
        decode, prefill = found["decode"], found["prefill"]
        work = prefill.flop / prefill.moved_bytes / (decode.flop / decode.moved_bytes)
        lines = [
            f"A prompt's {prefill.tokens:,.0f} tokens are multiplied with each weight that is read,"
            f" a decoded token alone: {number(work)} times the FLOP for each byte. So prefill"
            f" takes in {number(prefill.tokens / prefill.seconds)} tokens/s where decode, with the"
            f" same weights, puts out {number(1 / decode.seconds)}.",
            "FLOP and bytes are those of the model's shape, not what the device happened to do;"
            f" *bound by* is the work beside this machine's ridge,"
            f" {number(decode.point.ceilings.ridge_flops_per_byte)} FLOP a byte.",
        ]
    return Finding(title="Two phases, two limits", rows=rows, lines=lines)


def flags(context: Context) -> Finding:
    """Every variant beside the engine's defaults: which of their settings one stream feels."""
    rows = [[
        "Variant", "TPOT", "MBU", "Beside the defaults", "Matters to decode",
        "TTFT of the long prompt", "MFU", "Beside the defaults", "Matters to prefill",
    ]]  # fmt: skip
    fastest: list[tuple[float, str, Phase]] = []
    told: dict[str, list[str]] = {"yes": [], "no": [], "not settled": [], NOT_VALID: []}
    for variant in context.lab.variants:
        decode, prefill = (phase(context, variant.name, name) for name in METRIC_OF)
        if decode is None and prefill is None:
            continue
        ratios = {name: beside(context, variant.name, name) for name in METRIC_OF}
        if decode and ratios["decode"][1] != NOT_VALID:
            fastest.append((decode.seconds, variant.name, decode))
        rows.append([
            variant.name,
            number(decode.seconds if decode else None, "s"),
            f"{decode.bandwidth:.0%}" if decode else "–",
            *ratios["decode"],
            number(prefill.seconds if prefill else None, "s"),
            f"{prefill.arithmetic:.0%}" if prefill else "–",
            *ratios["prefill"],
        ])  # fmt: skip
        if (matters := ratios["decode"][1]) in told:
            told[matters].append(f"`{variant.name}` {ratios['decode'][0]}")
    lines = []
    if fastest:
        _, name, best = min(fastest, key=lambda f: f[0])
        lines.append(
            f"`{name}` decodes fastest, with {best.bandwidth:.0%} of the measured bandwidth; the"
            f" rest of a step, {number(best.seconds * (1 - best.bandwidth), 's')}, is not reading."
        )
    for text, matters in (
        ("It matters to decode, TPOT beside the defaults", "yes"),
        ("It does not", "no"),
        ("Not settled by these repeats", "not settled"),
        ("Not valid, see validity", NOT_VALID),
    ):
        lines += [f"{text}: {', '.join(told[matters])}."] if told[matters] else []
    return Finding(title="Which flag matters to one stream?", rows=rows, lines=lines)


def beside(context: Context, variant: str, workload: str) -> tuple[str, str]:
    """(the ratio to the defaults with its interval, whether it is one); dashes for themselves."""
    metric = METRIC_OF[workload]
    pair = [context.point(name, workload, "concurrent:1") for name in (variant, "default")]
    keys = [point.key for point in pair if point]
    repeats = [by_repeat(context.values.get(key, {}), metric) for key in keys]
    found = effect(*repeats) if variant != "default" and len(repeats) == len(pair) else None
    if found is None:
        return "–", "–"
    withheld = any(caveat.hits(metric, *keys) for caveat in context.caveats)
    return times(found.ratio), NOT_VALID if withheld else MATTERS[outcome_of(found, metric)]
