"""What weights of fewer bits weigh, how fast they are, and speed against quality."""

from __future__ import annotations

from dataclasses import dataclass

from dashboards.palette import VARIANTS
from labs.filing.results import Finding
from labs.findings.context import Context, JudgedRun
from labs.findings.drawing import GREY, plt
from labs.findings.parts import Conclusion
from labs.findings.quality import compared, figure_of
from labs.judging.text import number


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
    tokens_per_s: float | None  # at the largest load
    prefill_s: float | None
    making: Making | None


@dataclass(frozen=True)
class KindsOfWeights:
    """Holds every variant's weights, beside those of the run's first point."""

    kinds: tuple[Weights, ...]
    plain_bytes: float
    plain_tpot_s: float | None
    most_users: int
    prefill_tokens: float | None  # None where the lab prefills nothing on its own


def kinds_of_weights(context: Context) -> KindsOfWeights:
    plain = context.points[0]
    prefill = next((p for p in context.points if p.workload.name == "prefill"), None)
    most = max(p.load.users for p in context.points if p.workload.name == "decode")
    return KindsOfWeights(
        kinds=tuple(
            Weights(
                variant=v.name,
                in_memory_bytes=next(
                    p.shape.weight_bytes for p in context.points if p.variant.name == v.name
                ),
                tpot_s=context.mean_at(v.name, "decode", 1, "tpot_mean_s"),
                tokens_per_s=context.mean_at(v.name, "decode", most, "output_tokens_per_s"),
                prefill_s=context.mean_at(v.name, "prefill", 1, "ttft_mean_s"),
                making=_making(context, v.weights),
            )
            for v in context.lab.variants
        ),
        plain_bytes=plain.shape.weight_bytes,
        plain_tpot_s=context.mean_at(plain.variant.name, "decode", 1, "tpot_mean_s"),
        most_users=most,
        prefill_tokens=prefill.prompt_tokens if prefill else None,
    )


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
        ratio, plain_s = facts.plain_bytes / kind.in_memory_bytes, facts.plain_tpot_s
        row = [
            f"`{kind.variant}`",
            f"{kind.in_memory_bytes / 1e6:,.0f} MB",
            f"{1 / ratio:.2f}",
            number(kind.tpot_s, "s"),
            f"{plain_s / kind.tpot_s:.2f}x" if plain_s and kind.tpot_s else "–",
            f"{ratio:.2f}x",
        ]
        if many > 1:
            row.append(number(kind.tokens_per_s, "tok/s"))
        if prompt:
            row.append(f"{prompt / kind.prefill_s:,.0f} tok/s" if kind.prefill_s else "–")
        rows.append([*row, _maker(kind.making)])
    lines = [
        "*By bytes* is what decode would gain at one stream if reading weights were all it did. On"
        " an accelerator fewer bytes are fewer microseconds; where unpacking 4-bit weights costs"
        " arithmetic on every step, as on a CPU, W4 saves memory and not time, and INT8, for which"
        " it has instructions, wins."
    ]
    return Finding(title="What the weights weigh, and how fast they are", rows=rows, lines=lines)


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
    tpot_s = {name: run.interval(p, "tpot_mean_s") for name, p in at.items()}
    plain = tpot_s.get(base)
    if not treatments or plain is None:
        return None
    _, ax = plt.subplots(figsize=(6.5, 4))
    for colour, name in zip(VARIANTS, [base, *treatments], strict=False):
        figures = treatments.get(name)
        ratio = figure_of(figures, "perplexity_ratio") if figures else None
        ours = tpot_s.get(name)
        if ours is None:
            continue
        x, y = plain.value / ours.value, ratio.value if ratio else 1.0
        reach = [[y - (ratio.low or y)], [(ratio.high or y) - y]] if ratio else None
        size = at[name].shape.weight_bytes / 1e6
        ax.errorbar(x, y, yerr=reach, fmt="o", color=colour, capsize=4, ms=8,
                    label=f"{name}, {size:,.0f} MB")  # fmt: skip
    ax.axhline(1.02, color=GREY, ls=":", label="gate: 2 % more perplexity")
    ax.set_xlabel("decode speed-up, one stream")
    ax.set_ylabel(f"perplexity / that of {base}")
    ax.legend(frameon=False, fontsize=8)
    return "Speed against quality: right is faster, down is better."
