"""Conclude how large, fast and accurate quantized weights are."""

from __future__ import annotations

from dataclasses import dataclass

from dashboards.palette import VARIANTS
from labs.harness.facts.context import Context, JudgedRun
from labs.harness.facts.drawing import GREY, plt
from labs.harness.facts.parts import Conclusion
from labs.harness.facts.quality import compared, figure_of
from labs.harness.filing.results import Finding
from labs.harness.judging.judge import Interval
from labs.harness.judging.quality import MARGINS
from labs.harness.judging.text import number, times_with_interval


@dataclass(frozen=True)
class Making:
    """Records how a variant's weights were quantized."""

    tool: str
    tool_version: str
    took_s: float
    calibration: str


@dataclass(frozen=True)
class Weights:
    """Holds a variant's bytes of weights and what was measured with them; None if not."""

    variant: str
    in_memory_bytes: float
    tpot_s: float | None  # at one stream
    speed_up: Interval | None  # TPOT of the run's first point / this one's; None for the first
    tokens_per_s: float | None  # at the largest load
    prefill_s: float | None
    making: Making | None


@dataclass(frozen=True)
class KindsOfWeights:
    """Holds every variant's weights, beside those of the run's first point."""

    kinds: tuple[Weights, ...]
    plain_bytes: float
    most_users: int
    prefill_tokens: float | None  # None where the lab prefills nothing on its own


def kinds_of_weights(context: Context) -> KindsOfWeights:
    plain = context.points[0]
    prefill = next((p for p in context.points if p.workload.name == "prefill"), None)
    most = max((p.load.users for p in context.points if p.workload.name == "decode"), default=1)
    in_memory_bytes = {p.variant.name: p.shape.weight_bytes for p in context.points}
    return KindsOfWeights(
        kinds=tuple(
            Weights(
                variant=v.name,
                in_memory_bytes=in_memory_bytes[v.name],
                tpot_s=context.mean_at(v.name, "decode", 1, "tpot_mean_s"),
                speed_up=decode_speed_up(context, plain.variant.name, v.name),
                tokens_per_s=context.mean_at(v.name, "decode", most, "output_tokens_per_s"),
                prefill_s=context.mean_at(v.name, "prefill", 1, "ttft_mean_s"),
                making=_making(context, v.weights),
            )
            for v in context.lab.variants
            if v.name in in_memory_bytes
        ),
        plain_bytes=plain.shape.weight_bytes,
        most_users=most,
        prefill_tokens=prefill.prompt_tokens if prefill else None,
    )


def decode_speed_up(context: Context, plain: str, variant: str) -> Interval | None:
    """Divides TPOT of the plain weights at one stream by a variant's; None for the plain ones."""
    base, ours = (context.point(name, "decode", "concurrent:1") for name in (plain, variant))
    gain = context.effect(base, ours, "tpot_mean_s") if base and ours and base != ours else None
    return gain.ratio if gain else None


def _making(context: Context, weights: str) -> Making | None:
    about = context.run.about.get(weights, {})
    if "tool" not in about:
        return None
    calibration = about.get("calibration") or ""
    return Making(about["tool"], about["tool_version"], about["seconds"], calibration)


def tell_weights(facts: KindsOfWeights) -> Finding:
    """Shows bytes, speed, the bound by bytes and the origin of every kind of weights."""
    many, prompt = facts.most_users, facts.prefill_tokens
    rows = [["Weights", "In memory", "Bytes ratio", "TPOT, one stream", "Speed-up", "By bytes",
             *([f"Throughput, {many} in flight"] if many > 1 else []),
             *(["Prefill"] if prompt else []), "Made by"]]  # fmt: skip
    for kind in facts.kinds:
        ratio = facts.plain_bytes / kind.in_memory_bytes
        row = [
            f"`{kind.variant}`",
            f"{kind.in_memory_bytes / 1e6:,.0f} MB",
            f"{1 / ratio:.2f}",
            number(kind.tpot_s, "s"),
            times_with_interval(kind.speed_up) if kind.speed_up else "–",
            f"{ratio:.2f}x",
        ]
        if many > 1:
            row.append(number(kind.tokens_per_s, "tok/s"))
        if prompt:
            row.append(f"{prompt / kind.prefill_s:,.0f} tok/s" if kind.prefill_s else "–")
        rows.append([*row, _maker(kind.making)])
    lines = [
        "*By bytes* is what decode would gain at one stream if it only read weights. Unpacking"
        " 4-bit weights costs arithmetic in every step, which a GPU does while it reads. A CPU has"
        " instructions for INT8, and none for this."
    ]
    return Finding(title="How large the weights are, and how fast", rows=rows, lines=lines)


def _maker(making: Making | None) -> str:
    if making is None:
        return "–"
    text = f"{making.tool} {making.tool_version}, {making.took_s:.0f} s"
    return f"{text}, {making.calibration}" if making.calibration else text


WEIGHTS = Conclusion("weights", kinds_of_weights, tell_weights)


def draw_tradeoff(run: JudgedRun) -> str | None:
    """Draws perplexity against speed, a dot for each kind of weights."""
    treatments = run.once(compared).treatments
    base = run.lab.variants[0].name
    at = {
        p.variant.name: p for p in run.points if p.workload.name == "decode" and p.load.users == 1
    }
    if not treatments or base not in at or run.mean(at[base], "tpot_mean_s") is None:
        return None
    _, ax = plt.subplots(figsize=(6.5, 4))
    forecast_label = "speed-up forecast before the run"
    for colour, name in zip(VARIANTS, [base, *treatments], strict=False):
        figures = treatments.get(name)
        ratio = figure_of(figures, "perplexity_ratio") if figures else None
        gain = decode_speed_up(run, base, name)
        if gain is None and name != base:
            continue
        x, y = gain.value if gain else 1.0, ratio.value if ratio else 1.0
        reach = [[y - (ratio.low or y)], [(ratio.high or y) - y]] if ratio else None
        foreseen = run.forecast_ratio(at[base], at[name], "tpot_mean_s")
        if foreseen and name != base:
            ax.plot(foreseen, y, "|", color=GREY, ms=14, mew=2, label=forecast_label)
            forecast_label = "_nolegend_"
        size = at[name].shape.weight_bytes / 1e6
        ax.errorbar(x, y, yerr=reach, fmt="o", color=colour, capsize=4, ms=8,
                    label=f"{name}, {size:,.0f} MB")  # fmt: skip
    most = next(m.at_most for m in MARGINS if m.figure == "perplexity_ratio")
    ax.axhline(most, color=GREY, ls=":", label=f"gate: {most - 1:.0%} more perplexity")
    ax.set_xlabel("decode speed-up, one stream")
    ax.set_ylabel(f"perplexity / that of {base}")
    ax.legend(frameon=False, fontsize=8)
    return "Speed and quality: further right is faster, further down is better."
