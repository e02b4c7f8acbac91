"""This module tells what each engine makes of the machine, whether they agree, what each lacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

from dashboards.palette import VARIANTS
from labs.harness.facts.context import Context, JudgedRun
from labs.harness.facts.drawing import (
    BANDS,
    draw_forecasts_of_two,
    draw_logarithmic,
    legend_of_all,
    plt,
)
from labs.harness.facts.parts import Conclusion, Headline, ReportParts
from labs.harness.filing.results import Band, Finding
from labs.harness.judging.text import number, sentences
from serving.engines import DEFAULT_ENGINE, ENGINES

# ----------------------------------------------------------------------------------- the curves


@dataclass(frozen=True)
class At:
    """Holds what an engine did for so many users; None for what was not measured."""

    variant: str
    users: int
    batch: float | None  # requests in decode at once
    tokens_per_s: float
    tpot_s: float
    ttft_s: float | None
    mbu: float | None
    forecast: Mapping[str, Band]  # metric -> what was forecast; empty where the engine has none
    tpot_is_valid: bool  # whether nothing withholds a verdict on it
    tokens_are_valid: bool


def curves(context: Context) -> tuple[At, ...]:
    """Reads the curve of each engine, from the fewest users on."""
    played, read = context.predictions.in_virtual_time, []
    for point in context.points:
        rate, tpot_s, ttft_s, batch, mbu = (
            context.mean(point, metric)
            for metric in ("output_tokens_per_s", "tpot_mean_s", "ttft_mean_s", "batch", "mbu")
        )
        if rate and tpot_s:
            forecast = played.points.get(point.key, {}) if played else {}
            name, users = point.variant.name, point.load.users
            valid = (
                not context.withholds(metric, point)
                for metric in ("tpot_mean_s", "output_tokens_per_s")
            )
            read.append(At(name, users, batch, rate, tpot_s, ttft_s, mbu, forecast, *valid))
    return tuple(read)


def of(facts: Sequence[At], variant: str) -> list[At]:
    return sorted((at for at in facts if at.variant == variant), key=lambda at: at.users)


def tell_curves(facts: tuple[At, ...]) -> Finding:
    rows = [["Engine", "Users", "Requests in decode", "Throughput", "TPOT", "TTFT", "MBU"]]
    rows += [
        [
            f"`{at.variant}`",
            str(at.users),
            number(at.batch),
            number(at.tokens_per_s, "tok/s"),
            number(at.tpot_s, "s"),
            number(at.ttft_s, "s"),
            number(at.mbu, "share"),
        ]
        for at in facts
    ]
    lines = []
    if facts:
        lines = [
            "Means over the repeats. MBU counts what a step must read at the requests in decode:"
            " engines of the same MBU come as near to the machine's bandwidth, whatever their"
            " throughput. Where one request is served at a time, TTFT holds the wait for all"
            " others.",
        ]
    return Finding(title="What does each engine make of the machine?", rows=rows, lines=lines)


FORECAST_ACROSS = ("tpot_mean_s", "ttft_mean_s")


def draw_curves(facts: tuple[At, ...]) -> str | None:
    """Draws throughput against TPOT, a line for each engine, from few users to many."""
    if not facts:
        return None
    names, forecast = list(dict.fromkeys(at.variant for at in facts)), False
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.6))
    for name, colour in zip(names, VARIANTS, strict=False):
        mine = of(facts, name)
        for ax, x, metric in zip(axes, ("tpot_s", "ttft_s"), FORECAST_ACROSS, strict=True):
            forecasts = [
                (at.forecast.get(metric), at.forecast.get("output_tokens_per_s")) for at in mine
            ]
            label = f"{name}, forecast"
            forecast |= draw_forecasts_of_two(ax, forecasts, lambda s: 1000 * s, label)
            known = [(v, at) for at in mine if (v := getattr(at, x)) is not None]
            ax.plot(
                [1000 * v for v, _ in known],
                [at.tokens_per_s for _, at in known],
                "o-", color=colour, label=name, ms=4,
            )  # fmt: skip
            for v, at in known:
                ax.annotate(
                    str(at.users), (1000 * v, at.tokens_per_s), fontsize=7, color=colour,
                    textcoords="offset points", xytext=(4, 4),
                )  # fmt: skip
    for ax, title in zip(axes, ("TPOT, mean (ms)", "TTFT, mean (ms)"), strict=True):
        draw_logarithmic(ax)
        ax.set_xlabel(title)
    axes[0].set_ylabel("output throughput (tok/s)")
    legend_of_all(figure, axes)
    return (
        "Throughput against what each user waits for a token (left) and for the first one (right)."
        " The figures beside the points are the users. Up and to the left is better."
        + BANDS
        * forecast
    )


CURVES = Conclusion("curves", curves, tell_curves, draw_curves)

# ------------------------------------------------------------------------------- the same words


@dataclass(frozen=True)
class SameWords:
    """Compares an engine's answers to one user with vLLM's to the same prompts."""

    variant: str
    answers: int  # in all its trials
    of_length: int  # of these, as long as was asked for, by its own usage
    compared: int
    same: int
    leading: float | None  # mean share of the words before the first that differs


def same_words(context: Context) -> tuple[SameWords, ...]:
    """Compares greedy answers; requests pair up by repeat and index."""
    texts: dict[str, dict[tuple[int, int], str]] = {}
    lengths: dict[str, list[bool]] = {}
    for point, result, trial in context.folder.trials(context.points, context.lab):
        if trial is None:
            continue
        done = [r for r in trial.records if r.ok]
        lengths.setdefault(point.variant.name, []).extend(
            r.output_tokens == r.asked_tokens for r in done
        )
        if point.load.users == 1:
            texts.setdefault(point.variant.name, {}).update(
                {(result.repeat, r.index): r.text for r in done if r.text is not None}
            )
    base = next((v.name for v in context.lab.variants if v.engine == DEFAULT_ENGINE), "")
    compared = []
    for name, right in lengths.items():
        mine, theirs = texts.get(name, {}), texts.get(base, {})
        pairs = [(mine[key], theirs[key]) for key in sorted(mine.keys() & theirs.keys())]
        shares = [leading_share(a, b) for a, b in pairs]
        compared.append(
            SameWords(
                variant=name,
                answers=len(right),
                of_length=sum(right),
                compared=0 if name == base else len(pairs),
                same=0 if name == base else sum(a == b for a, b in pairs),
                leading=None if name == base or not shares else sum(shares) / len(shares),
            )
        )
    return tuple(compared)


def leading_share(text: str, other: str) -> float:
    """Returns the share of the longer text's words before the first that differs."""
    words, other_words = text.split(), other.split()
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(words, other_words)))  # noqa: B905
    return same / max(len(words), len(other_words), 1)


def tell_same_words(facts: tuple[SameWords, ...]) -> Finding:
    rows = [["Engine", "Answers", "Of the length asked for", "Compared with vLLM's", "The same",
             "Words before the first difference"]]  # fmt: skip
    rows += [
        [
            f"`{w.variant}`",
            str(w.answers),
            f"{w.of_length / w.answers:.0%}" if w.answers else "–",
            str(w.compared) if w.compared else "–",
            f"{w.same / w.compared:.0%}" if w.compared else "–",
            number(w.leading, "share"),
        ]
        for w in facts
    ]
    lines = [
        "Greedy answers to the same prompts, one user at a time. All engines have the same weights,"
        " but add up their products in another order, so a near tie between two tokens may"
        " go the other way, and all words after it are others: that is no error of an engine. An"
        " engine that loaded other weights or wrote another prompt would agree on hardly any word.",
    ]
    return Finding(title="Do they write the same?", rows=rows, lines=lines)


SAME_WORDS = Conclusion("same-words", same_words, tell_same_words)

# ---------------------------------------------------------------------------- what each cannot do


@dataclass(frozen=True)
class Lacking:
    """Names what an engine cannot do, or asks for in another way."""

    engine: str
    title: str
    version: str | None
    metric_count: int  # of the metrics that the lab knows
    lacks: tuple[str, ...]


@dataclass(frozen=True)
class Lackings:
    """Holds the engines of a run."""

    engines: tuple[Lacking, ...]
    most_metrics: int


def lackings(context: Context) -> Lackings:
    names = list(dict.fromkeys(v.engine for v in context.lab.variants))
    version_of = context.run.environment.version_of
    return Lackings(
        engines=tuple(
            Lacking(
                engine=name,
                title=engine.title,
                version=version_of(engine.distributions),
                metric_count=len(engine.shown_metrics()),
                lacks=tuple(engine.lacks),
            )
            for name in names
            for engine in [ENGINES[name]]
        ),
        most_metrics=len(ENGINES[DEFAULT_ENGINE].shown_metrics()),
    )


def tell_lackings(facts: Lackings) -> Finding:
    rows = [["Engine", "Version", "Metrics shown", "What it lacks, beside vLLM"]]
    rows += [
        [
            e.title,
            e.version or "from PATH",
            f"{e.metric_count} of {facts.most_metrics}" if e.metric_count else "none",
            "; ".join(e.lacks) or "–",
        ]
        for e in facts.engines
    ]
    lines = [
        "*Metrics shown* counts those that the lab reads, by its own names. Where an engine shows"
        " none, a trial rests on what the client read: the length and the usage of each answer, the"
        " model's name in it, its text.",
    ]
    return Finding(title="What can each not do?", rows=rows, lines=lines)


CANNOT = Conclusion("cannot", lackings, tell_lackings)

# ------------------------------------------------------------------------------------ the answer


def answer(run: JudgedRun) -> str | None:
    facts = run.once(curves)
    names = list(dict.fromkeys(at.variant for at in facts))
    if len(names) < 2:
        return None
    loads = {name: {at.users: at for at in of(facts, name)} for name in names}
    shared = sorted(set.intersection(*(set(by_users) for by_users in loads.values())))
    if not shared:  # some engine has no load in common with the others
        return None
    few, many = shared[0], shared[-1]
    alone = sorted(
        (by_users[few] for by_users in loads.values()),
        key=lambda at: (not at.tpot_is_valid, at.tpot_s),
    )
    loaded = sorted(
        (by_users[many] for by_users in loads.values()),
        key=lambda at: (not at.tokens_are_valid, -at.tokens_per_s),
    )
    clauses = [
        f"with {few} user{'s' * (few > 1)} a token takes "
        + ", ".join(
            f"{number(at.tpot_s, 's') if at.tpot_is_valid else 'not valid'} (`{at.variant}`)"
            for at in alone
        ),
        f"with {many} user{'s' * (many > 1)} the throughput is "
        + ", ".join(
            f"{number(at.tokens_per_s, 'tok/s') if at.tokens_are_valid else 'not valid'}"
            f" (`{at.variant}`)"
            for at in loaded
        ),
    ]
    words = SAME_WORDS.facts_of(run) or ()
    agreed = [w for w in words if w.compared]
    if agreed:
        clauses.append(
            "of vLLM's greedy answers to the same prompts "
            + ", ".join(f"`{w.variant}` wrote {w.same} of {w.compared}" for w in agreed)
            + " word for word"
        )
    return sentences(clauses)


PARTS = ReportParts(
    conclusions=(CURVES, SAME_WORDS, CANNOT),
    answers={"SO-7": answer},
    headline=Headline(
        claim="load",
        done="Batching continuously instead of serving one request at a time",
        figure="the throughput under load",
    ),
)
