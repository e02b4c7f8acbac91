"""What each engine makes of the machine, whether they agree, what each lacks; what 4 bits cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from labs.harness.analysis.quantity import Quantity
from labs.harness.derived.quality_summary import perplexity_ratio
from labs.harness.derived.run_view import JudgedRun
from labs.serving_engines.lab import EAGER, LLAMA, LLAMA_Q4, VLLM
from serving.engines import DEFAULT_ENGINE, ENGINES
from serving.models.to_gguf import BF16, Q4

SECOND_STARTS = {EAGER.name, LLAMA_Q4.name}  # of an engine that is ranked as its makers start it


@dataclass(frozen=True)
class Facts:
    curves: tuple[At, ...]
    same_words: tuple[SameWords, ...]
    cannot: tuple[Lacking, ...]
    most_metrics: int  # that an engine may show
    ranked: Ranked | None  # None without two engines, or a load that all of them had
    is_vllm_eager: bool  # started by `enforce-eager`, and not compiled as it is by default
    gguf: Gguf | None = None  # None where a file in 4 or in 16 bits was not served

    @property
    def compared(self) -> list[SameWords]:
        """The engines whose words were compared with vLLM's."""
        return [words for words in self.same_words if words.compared]


def facts(run: JudgedRun) -> Facts:
    engines = dict.fromkeys(v.engine for v in run.lab.variants)
    measured = curves(run)
    return Facts(
        measured,
        same_words(run),
        tuple(lacking(run, name) for name in engines),
        len(ENGINES[DEFAULT_ENGINE].shown_metrics()),
        ranked([at for at in measured if at.variant not in SECOND_STARTS]),
        any(p.flags.get("enforce-eager") for p in run.points if p.variant.name == VLLM.name),
        gguf(run, measured),
    )


# ------------------------------------------------------------------- what each makes of the machine


@dataclass(frozen=True)
class At:
    """What an engine did for so many users; TPOT and throughput as measured, valid or not."""

    variant: str
    users: int
    batch: Quantity  # requests in decode at once
    tokens_per_s: Quantity
    tpot_s: Quantity
    ttft_s: Quantity
    mbu: Quantity
    valid_tokens_per_s: Quantity  # missing where something withholds a verdict on it
    valid_tpot_s: Quantity


@dataclass(frozen=True)
class Ranked:
    """The engines at the fewest and at the most users that all of them were measured with."""

    few: int
    many: int
    alone: tuple[At, ...]  # by TPOT with few users, the shortest first
    loaded: tuple[At, ...]  # by throughput with many, the largest first


def curves(run: JudgedRun) -> tuple[At, ...]:
    """Read the curve of each engine, from the fewest users on."""
    read = []
    for point in run.points:
        batch, tokens_per_s, tpot_s, ttft_s, mbu = (
            run.quantity(point, metric).brief
            for metric in ("batch", "output_tokens_per_s", "tpot_mean_s", "ttft_mean_s", "mbu")
        )
        if tokens_per_s.value and tpot_s.value:
            valid = (
                Quantity.missing("not valid", of.unit) if run.withholds(metric, point) else of
                for metric, of in (("output_tokens_per_s", tokens_per_s), ("tpot_mean_s", tpot_s))
            )
            name, users = point.variant.name, point.load.users
            read.append(At(name, users, batch, tokens_per_s, tpot_s, ttft_s, mbu, *valid))
    return tuple(read)


def ranked(curves: Sequence[At]) -> Ranked | None:
    """Rank the engines by their valid figures; those that are not valid come last."""
    users = dict[str, set[int]]()
    for at in curves:
        users.setdefault(at.variant, set()).add(at.users)
    if len(users) < 2 or not (shared := set.intersection(*users.values())):
        return None
    few, many = min(shared), max(shared)
    alone, loaded = ([at for at in curves if at.users == n] for n in (few, many))
    alone.sort(key=lambda at: (not at.valid_tpot_s.known, at.tpot_s.value))
    loaded.sort(key=lambda at: (not at.valid_tokens_per_s.known, -(at.tokens_per_s.value or 0)))
    return Ranked(few, many, tuple(alone), tuple(loaded))


# --------------------------------------------------------------------------- 4 bits in a GGUF file


@dataclass(frozen=True)
class InFile:
    """What llama.cpp makes of one GGUF file, with the fewest users and with the most."""

    variant: str
    size: Quantity
    alone: At
    loaded: At


@dataclass(frozen=True)
class Gguf:
    """A GGUF file in 4 bits beside one in 16, on the same engine."""

    four: InFile
    sixteen: InFile
    perplexity: Quantity  # of the rounded weights on held-out text / before


def gguf(run: JudgedRun, curves: Sequence[At]) -> Gguf | None:
    """Compare the two files; None where one was not served."""
    sizes = {p.variant.name: Quantity(p.shape.weight_bytes / 1e6, "MB") for p in run.points}
    served = [
        InFile(v.name, sizes[v.name], rows[0], rows[-1])
        for v in (LLAMA_Q4, LLAMA)
        if (rows := [at for at in curves if at.variant == v.name])
    ]
    about = run.run.about.get(LLAMA_Q4.weights, {})
    if len(served) < 2 or "loss_nats" not in about:
        return None
    nats, tokens = about["loss_nats"], about["passages_tokens"]
    return Gguf(served[0], served[1], perplexity_ratio(nats[Q4], nats[BF16], tokens))


# ---------------------------------------------------------------------- whether they write the same


@dataclass(frozen=True)
class SameWords:
    """Compares an engine's answers to one user with vLLM's to the same prompts."""

    variant: str
    answers: int  # in all its trials
    of_length: int  # of these, as long as was asked for, by its own usage
    compared: int
    same: int
    leading: Quantity  # mean share of the words before the first that differs

    @property
    def length_share(self) -> Quantity:
        return Quantity(self.of_length, "share") / self.answers

    @property
    def same_share(self) -> Quantity:
        return Quantity(self.same, "share") / self.compared


def same_words(run: JudgedRun) -> tuple[SameWords, ...]:
    """Compare greedy answers; requests pair up by repeat and index."""
    texts: dict[str, dict[tuple[int, int], str]] = {}
    lengths: dict[str, list[bool]] = {}
    for point, result, trial in run.folder.trials(run.points, run.lab):
        if trial is None:
            continue
        name, done = point.variant.name, trial.answered
        lengths.setdefault(name, []).extend(r.output_tokens == r.asked_tokens for r in done)
        if point.load.users == 1:
            texts.setdefault(name, {}).update(
                {(result.repeat, r.index): r.text for r in done if r.text is not None}
            )
    base = next((v.name for v in run.lab.variants if v.engine == DEFAULT_ENGINE), "")
    compared = []
    for name, right in lengths.items():
        mine, theirs = texts.get(name, {}), texts.get(base, {})
        keys = sorted(mine.keys() & theirs.keys()) if name != base else []
        shares = [leading_share(mine[key], theirs[key]) for key in keys]
        compared.append(
            SameWords(
                variant=name,
                answers=len(right),
                of_length=sum(right),
                compared=len(keys),
                same=sum(mine[key] == theirs[key] for key in keys),
                leading=Quantity(sum(shares), "share") / len(shares),
            )
        )
    return tuple(compared)


def leading_share(text: str, other: str) -> float:
    """Return the share of the longer text's words before the first that differs."""
    words, other_words = text.split(), other.split()
    pairs = zip(words, other_words, strict=False)
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    return same / max(len(words), len(other_words), 1)


# ------------------------------------------------------------------------------ what each cannot do


@dataclass(frozen=True)
class Lacking:
    """What an engine cannot do, or asks for in another way."""

    title: str
    version: str | None  # None: the program that PATH finds
    metric_count: int  # of the metrics that the lab knows
    lacks: tuple[str, ...]


def lacking(run: JudgedRun, name: str) -> Lacking:
    engine = ENGINES[name]
    return Lacking(
        engine.title,
        run.run.environment.version_of(engine.distributions),
        len(engine.shown_metrics()),
        tuple(engine.lacks),
    )
