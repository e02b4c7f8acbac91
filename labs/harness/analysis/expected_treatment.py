"""Computes how much of its treatment a trial must show, from what its requests share.

A hit rate or an acceptance above zero does not prove that a treatment was given as planned. So the
engine's own counts are held against bounds that follow from the requests that were sent. The bounds
meet in one number where the count is exact.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import scipy

from labs.harness.analysis.measure import Trial, counter_increase, output_tokens
from loadtests.records import RequestRecord
from serving import metrics

BAND = 0.15  # of a predicted share: how far from it the dose may be
SHARED_BY_TEMPLATE = 64  # tokens at most, where a run did not record how many its template has
SHARED_BY_TASK = 16  # tokens at most of the instruction that every prompt of a task begins with


@dataclass(frozen=True)
class Bounds:
    """Holds the two numbers between which a count must lie, bounds included."""

    low: float
    high: float

    def hold(self, value: float) -> bool:
        return self.low <= value <= self.high

    def __str__(self) -> str:
        if self.low == self.high:
            return f"exactly {self.low:.0f}"
        return f"{self.low:.0f} to {self.high:.0f}"


def caching(trial: Trial) -> bool:
    """Tell whether the point's engine is to cache prefixes."""
    return trial.point.flags.enable_prefix_caching


@dataclass(frozen=True)
class CacheHits:
    """Holds how many prompt tokens a trial found in its prefix cache, and how many it can have."""

    hits: float
    answered: int  # prompts
    looked_up: int  # tokens of the prompts that were answered
    most: float  # that can have been found
    by_chance: bool  # the least is not known to the token


def cached_tokens(trial: Trial, template_tokens: int | None) -> Bounds | None:
    """Bound the prompt tokens that the engine must have found in its prefix cache.

    `template_tokens` is the most that all prompts share by their chat template. The texts after it,
    or after a planned prefix, may begin alike by chance, and fill a block together with it: how
    many tokens of each do is in its record, but for old runs. The cache holds whole blocks of
    tokens, and at least one token of a prompt is always computed. None where the engine does not
    say how large a block is.

    - Where nothing is shared, nothing but the template and such beginnings may be found. A cache
      that was not reset shows here.
    - In a primed trial whose prefixes all stay in the cache, each prompt finds its prefix, and the
      first one of each group, which was sent before, finds itself.
    - Of more prefixes in turn than the cache holds, none is found (least recently used).
    - A turn of a chat finds the turn before it, where one session after the other, or all of them
      with their last conversations, fit the cache.
    - Every sample of a prompt but the first finds the prompt.
    - Of shuffled documents, of prefixes that are drawn, come in an order of their own or count the
      template, and of anything that may or may not stay in the cache, only the most is known.
    - A request that failed may have found nothing, and may have left nothing to one other.

    Chance crosses none of these bounds. Where it decides how much is found, the repeats of a point
    are held together against its forecast as well: `hits_over_repeats`.
    """
    if not caching(trial):
        return Bounds(0, 0)
    cache = _Cache.of(trial)
    return None if cache is None else _hit_bounds(trial, cache, template_tokens)[0]


def cache_hits(trial: Trial, template_tokens: int | None) -> CacheHits | None:
    """Return what a trial found in its cache; None without one, or where it is not counted."""
    hits = counter_increase(trial, metrics.PREFIX_HITS)
    cache = _Cache.of(trial)
    if hits is None or cache is None or not caching(trial):
        return None
    bounds, chance_decides = _hit_bounds(trial, cache, template_tokens)
    answered = [r.prompt_tokens or 0 for r in trial.answered]
    return CacheHits(hits, len(answered), sum(answered), bounds.high, chance_decides)


def by_chance(trial: Trial) -> bool:
    """Tell whether chance decides how much a trial finds in its prefix cache."""
    cache = _Cache.of(trial)
    return bool(cache and caching(trial) and _hit_bounds(trial, cache, None)[1])


def hits_over_repeats(
    repeats: Sequence[CacheHits], least_rate: float, least_found: Sequence[int] = ()
) -> Bounds:
    """Bound what the repeats of a point must have found together.

    `least_found` are the fewest tokens that a trial of the forecast has found after each of its
    requests: the cache is empty at first, so few requests find less of their prompts than many. An
    old run has none. Then `least_rate` counts, the low end of the forecast's band of the hit rate,
    which is one of the mean over repeats and of as many requests as were forecast. The least is 15%
    below that; a single repeat may have found any part of it.
    """
    most = sum(repeat.most for repeat in repeats)
    if least_found:
        least = sum(_found_after(least_found, repeat.answered) for repeat in repeats)
    else:
        least = least_rate * sum(repeat.looked_up for repeat in repeats)
    return Bounds((1 - BAND) * min(least, most), most)


def _found_after(found: Sequence[int], requests: int) -> float:
    """Read what was found after so many requests; more than were forecast find at the same rate."""
    if requests <= len(found):
        return float(found[requests - 1]) if requests else 0.0
    return found[-1] * requests / len(found)


def _hit_bounds(trial: Trial, cache: _Cache, template_tokens: int | None) -> tuple[Bounds, bool]:
    """Bound what was found as `cached_tokens` does; tell whether chance decides how much it is."""
    workload = trial.point.workload
    head = SHARED_BY_TEMPLATE if template_tokens is None else template_tokens
    of_task = SHARED_BY_TASK if workload.task != "continue" else 0
    high, least = 0, list[int]()
    unknown = vary = _counts_vary(trial)
    for record in trial.records:
        shared = _shared(trial, record, cache)
        alike = of_task if record.alike_tokens is None else record.alike_tokens
        most = cache.whole(_looked_up_tokens(trial, record) - 1)
        high += min(most, cache.whole(head + alike + shared.most))
        least.append(min(most, cache.whole(shared.least)) if record.ok else 0)
        unknown |= shared.least < shared.most
    failed = sum(not record.ok for record in trial.records)
    low = 0.0 if vary else max(0.0, sum(least) - failed * max(least, default=0))
    return Bounds(low, high), unknown


def _looked_up_tokens(trial: Trial, record: RequestRecord) -> int:
    """Return the tokens of a prompt that the engine may have looked up in its cache.

    One that failed before its first token has no count of the server's, and may have been.
    """
    if record.prompt_tokens is None and not record.turned_away and record.index < len(trial.asked):
        return trial.asked[record.index].prompt_tokens
    return record.prompt_tokens or 0


@dataclass(frozen=True)
class _Shared:
    """Count a prompt's tokens, without its template's, that an earlier prompt left in the cache."""

    least: int
    most: int


@dataclass(frozen=True)
class _Cache:
    """The engine's prefix cache, as it describes itself."""

    block_tokens: int
    blocks: int | None

    @classmethod
    def of(cls, trial: Trial) -> _Cache | None:
        config = trial.cache_config
        block, blocks = config.get("block_size", ""), config.get("num_gpu_blocks", "")
        if not block.isdigit() or not int(block):
            return None
        return cls(int(block), int(blocks) if blocks.isdigit() else None)

    def whole(self, tokens: int) -> int:
        """Return how many of these tokens fill whole blocks."""
        return max(0, tokens) // self.block_tokens * self.block_tokens

    def holds(self, prompts: int, tokens: int) -> bool:
        """Tell whether so many prompts of so many tokens fit beside each other for certain."""
        each = math.ceil(tokens / self.block_tokens)
        return self.blocks is not None and prompts * each < self.blocks

    def loses(self, prompts: int, tokens: int) -> bool:
        """Tell whether so many prompts of so many tokens displace all that came before them."""
        return self.blocks is not None and not self.holds(prompts, tokens)


def _shared(trial: Trial, record: RequestRecord, cache: _Cache) -> _Shared:
    workload, users = trial.point.workload, trial.point.load.users
    longest = workload.longest_tokens
    if chat := workload.chat:
        if record.index % chat.turns == 0 or chat.salted == "request":
            return _Shared(0, 0)
        before = _looked_up_tokens(trial, record) - chat.grows_tokens
        # with several users the turn before may still be under way, unless each has its own session
        answered = (users == 1 or trial.point.turns > 1) and trial.point.flags.replicas == 1
        stays = answered and cache.holds(2 * users, longest)
        return _Shared(before if stays else 0, before)
    if workload.samples:
        whole_prompt = _looked_up_tokens(trial, record)
        if record.choice in (None, 0) and record.index % workload.copies == 0:
            return _Shared(0, 0)
        stays = cache.holds(2 * trial.point.sequences, longest)
        return _Shared(whole_prompt if stays else 0, whole_prompt)
    prefix = workload.prefix
    if prefix is None:
        return _Shared(0, 0)
    drawn = prefix.favourite is not None or prefix.order
    if drawn or prefix.with_template or trial.point.flags.replicas > 1:
        return _Shared(0, prefix.tokens)  # what is found depends on chance, and on the router
    if prefix.groups > 1 and cache.loses(prefix.groups - 1, longest):
        return _Shared(0, 0)
    stays = cache.holds(prefix.groups + users, longest)
    whole_prompt = _looked_up_tokens(trial, record)
    if workload.primed and record.index < prefix.groups:  # it was sent before the trial
        return _Shared(whole_prompt if stays else 0, whole_prompt)
    known = workload.primed or record.index >= prefix.groups * users
    return _Shared(prefix.tokens if stays and known and not prefix.shuffled else 0, prefix.tokens)


def _counts_vary(trial: Trial) -> bool:
    """Tell whether the least number of cached tokens cannot be known.

    A preempted request loses its blocks, a draft head that shares the target's cache leaves out the
    last block, and adapters have caches of their own.
    """
    preempted = counter_increase(trial, metrics.PREEMPTIONS) or 0.0
    point = trial.point
    return bool(preempted or point.flags.speculative_config or point.workload.adapters)


@dataclass(frozen=True)
class Guesses:
    """Holds how many tokens an engine guessed in a trial, and how many of these came true."""

    drafts: float
    drafted: float
    accepted: float
    config: Mapping[str, Any]  # of speculation

    @classmethod
    def of(cls, trial: Trial) -> Self | None:
        """Read the engine's counts; None where it does not count its drafts."""
        drafts, drafted, accepted = (
            counter_increase(trial, metric)
            for metric in (metrics.SPEC_DRAFTS, metrics.SPEC_DRAFTED, metrics.SPEC_ACCEPTED)
        )
        if drafts is None or drafted is None or accepted is None:
            return None
        return cls(drafts, drafted, accepted, trial.point.flags.speculative_config)

    @property
    def by_ngram(self) -> bool:
        return bool(self.config.get("method") == "ngram")

    def drafted_bounds(self) -> Bounds:
        """Bound how many tokens the engine must have drafted, given how often it did.

        A draft model guesses the configured number each time; looking for n-grams yields at most
        that many.
        """
        most = self.drafts * int(self.config["num_speculative_tokens"])
        return Bounds(min(1, most) if self.by_ngram else (1 - BAND) * most, most)

    def yield_bounds(self, trial: Trial) -> Bounds | None:
        """Bound the sum of drafts and accepted tokens where a draft model guesses in every step.

        Each step yields the accepted tokens and one of the target's own, so the sum is the number
        of tokens after the first of each request, within 15%: at a request's end more may be
        accepted than is sent. None where guesses are made now and then, or a request failed.
        """
        if self.by_ngram or any(not record.ok for record in trial.records):
            return None
        # a first chunk may hold more than the first token, where a client falls behind
        yielded = sum(sum(tokens for _, tokens in r.chunks) - 1 for r in trial.records)
        return Bounds((1 - BAND) * yielded, (1 + BAND) * yielded + len(trial.records))

    def accepted_bounds(self, predicted: float, trial: Trial) -> Bounds | None:
        """Bound the share of drafted tokens that must have been accepted; None without drafts.

        `predicted` is the chance that a token is accepted if all before it were, so that of g
        drafted tokens (a + a^2 + .. + a^g) / g are. The least is 15% below that, and below that by
        Student's 97.5% quantile of the standard error, with as many texts as were answered. The
        error is the most that so many independent drafts can have, or that from text to text where
        it is larger (`_error_over_texts`). A text that is guessed better than predicted is a
        finding and no fault; where the engine was told how much to accept, the most is bounded
        alike. A single text bounds nothing.
        """
        if not self.drafts:
            return None
        texts = [(len(r.chunks) - 1, output_tokens(r) - len(r.chunks)) for r in trial.records]
        texts = [(steps, accepted) for steps, accepted in texts if steps > 0]
        if len(texts) < 2:
            return Bounds(0.0, 1.0)
        guesses = int(self.config["num_speculative_tokens"])
        share = sum(predicted**i for i in range(1, guesses + 1)) / guesses
        error = max(0.5 / math.sqrt(self.drafts), self._error_over_texts(texts))
        chance = float(scipy.special.stdtrit(len(texts) - 1, 0.975)) * error
        synthetic = self.config.get("rejection_sample_method") == "synthetic"
        high = (1 + BAND) * share + chance if synthetic else 1.0
        return Bounds(max(0.0, (1 - BAND) * share - chance), high)

    def _error_over_texts(self, texts: Sequence[tuple[int, int]]) -> float:
        """Estimate the standard error of the share accepted, of texts as (steps, accepted tokens).

        Drafts of one text are guessed alike, so that the text is the unit: the error is that of a
        ratio of sums over texts (Cochran, "Sampling techniques", 1977, 6.4).
        """
        steps, accepted = np.array(texts, float).T
        off = accepted - accepted.sum() / steps.sum() * steps
        return math.sqrt(len(texts) / (len(texts) - 1) * float(off @ off)) / self.drafted


def copied_share(least: float) -> Bounds:
    """Bound the share of copied tokens that must have been accepted.

    `least` is the low end of the forecast's band, from the model's own answers: a few answers of a
    kind may hold next to nothing to copy, or much that is wrong together. The least is 15% below.
    """
    return Bounds((1 - BAND) * least, 1.0)
