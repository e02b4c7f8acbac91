"""Which token budget keeps the streams flowing?"""

from __future__ import annotations

from scipy import stats

from labs.filing.results import Finding
from labs.findings.context import Context
from labs.judging.text import number, yes


def token_budget(context: Context) -> Finding:
    """The budget that keeps the longest gap within the SLO at the earliest long first token.

    Also: the stall as a line over the budget, and the link a split of prefill from decode would
    need to be no slower (KV bytes of the prompt / time of its prefill; DistServe, OSDI 2024).
    """
    limit_s = context.lab.slo.itl_s
    rows = [["Variant", "Token budget", "Stall, mean", "TTFT of the long prompt", "Within the SLO"]]
    fitting: list[tuple[float, str]] = []
    line: list[tuple[float, float]] = []
    whole_s = None
    for point in context.points:
        stall_s, ttft_s = (context.mean(point, m) for m in ("stall_mean_s", "intruder_ttft_mean_s"))
        if stall_s is None or ttft_s is None or not point.workload.intruder:
            continue
        tokens = point.flags.max_num_batched_tokens
        prompt = point.workload.intruder.prompt_tokens
        ok = limit_s is not None and stall_s <= limit_s
        fitting += [(ttft_s, point.variant.name)] if ok else []
        line.append((min(tokens - point.load.users, prompt), stall_s))
        if not point.flags.enable_chunked_prefill:
            whole_s = ttft_s
        rows.append(
            [point.variant.name, str(tokens), number(stall_s, "s"), number(ttft_s, "s"),
             yes(ok if limit_s else None)]
        )  # fmt: skip
    lines = []
    if limit_s is not None:
        best = min(fitting, default=None)
        lines.append(
            f"With gaps of at most {number(limit_s, 's')}, `{best[1]}` gives the long prompt its"
            f" first token soonest, after {number(best[0], 's')}."
            if best
            else f"No budget here keeps the gaps within {number(limit_s, 's')}: a decode step alone"
            " takes most of that, or the budgets are too large."
        )
    if len(line) > 2:
        fit = stats.linregress(*zip(*line, strict=True))
        lines.append(
            f"The stall over the tokens a piece may have is a line: {number(fit.intercept, 's')}"
            f" + {1e3 * fit.slope:.3g} ms a token (R² {fit.rvalue**2:.3f}), so prefill runs at"
            f" {1 / fit.slope:,.0f} tok/s beside the streams."
        )
    point = context.points[0]
    if whole_s and point.workload.intruder:
        moved = point.workload.intruder.prompt_tokens * point.shape.kv_bytes_per_token()
        lines.append(
            f"A second machine that does the prefill would have to hand over {moved / 1e6:,.1f} MB"
            f" of keys and values; moved in the {number(whole_s, 's')} that the prefill takes"
            f" here, that is {8 * moved / whole_s / 1e9:.2f} Gbit/s: a faster link splits prefill"
            " from decode at less delay than it removes."
        )
    return Finding(title="Which token budget?", rows=rows, lines=lines)
