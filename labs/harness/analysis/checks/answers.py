"""Checks that client and engine agree on requests and tokens, and on what was asked for."""

from __future__ import annotations

import itertools

from labs.harness.analysis import expected_treatment
from labs.harness.analysis.checks.expected import Expected, Found
from labs.harness.analysis.measure import Trial, counter_increase
from labs.harness.analysis.text import counted, literal
from loadtests.structures import begins_so
from serving import metrics
from serving.engines import ENGINES

MOST_SEVERAL = 0.05  # share of chunks with several tokens, without speculation
MOSTLY_SEVERAL = 0.5  # beyond this share the times of single tokens are unknown
OTHER_TOKENIZER = 0.05  # by which an endpoint's count of a prompt's tokens may differ


def counts_differ(trial: Trial, _: Expected) -> Found:
    """Compare the engine's counts with the client's, between which another client would stand.

    Where requests failed, the engine may have counted any part of them.
    """
    done, failed = trial.answered, trial.failed
    prompts = [r.prompt_tokens or 0 for r in done]
    outputs = sum(r.output_tokens or 0 for r in done)
    of_failed = sum(r.asked_tokens for r in failed)
    for what, metric, client, more in (
        ("requests", metrics.REQUESTS, len(done), len(failed)),
        ("prompt tokens", metrics.PROMPT_TOKENS, sum(prompts), max([0, *prompts]) * len(failed)),
        ("output tokens", metrics.GENERATION_TOKENS, outputs, of_failed),
    ):
        engine = counter_increase(trial, metric)
        if engine is not None and not client <= engine <= client + more:
            yield {"engine": engine, "what": what, "client": client}


def without_page(trial: Trial, expected: Expected) -> Found:
    if trial.engine is None and _has_no_page(trial, expected):
        yield {}


def page_unread(trial: Trial, expected: Expected) -> Found:
    if trial.engine is None and not _has_no_page(trial, expected) and expected.metrics_read:
        yield {}


def endpoint_without_page(trial: Trial, expected: Expected) -> Found:
    if trial.engine is None and not _has_no_page(trial, expected) and not expected.metrics_read:
        yield {}


def _has_no_page(trial: Trial, expected: Expected) -> bool:
    return not expected.endpoint and not ENGINES[trial.point.variant.engine].shown_metrics()


def metrics_missing(trial: Trial, expected: Expected) -> Found:
    """Look for the metrics on which the checks rest."""
    if trial.engine is None:
        return
    needed = [metrics.REQUESTS, metrics.PROMPT_TOKENS, metrics.GENERATION_TOKENS]
    if expected_treatment.caching(trial) and not expected.endpoint:
        needed.append(metrics.PREFIX_HITS)
    needed.append(metrics.TTFT)
    if not expected.endpoint:
        known = ENGINES[trial.point.variant.engine].shown_metrics()
        needed = [name for name in needed if name in known]
    shown = trial.engine.values.keys() | trial.engine.histograms.keys()
    if missing := [name for name in needed if name not in shown]:
        yield {"missing": ", ".join(missing)}


def tokens_do_not_add_up(trial: Trial, _: Expected) -> Found:
    if odd := sum(sum(r.chunks.tokens) != r.output_tokens for r in trial.answered):
        yield {"answers": counted(odd, "answer")}


def mostly_several_tokens(trial: Trial, _: Expected) -> Found:
    if (several := trial.once(_several_tokens)) > MOSTLY_SEVERAL:
        yield {"several": several}


def often_several_tokens(trial: Trial, _: Expected) -> Found:
    if MOST_SEVERAL < (several := trial.once(_several_tokens)) <= MOSTLY_SEVERAL:
        yield {"several": several}


def _several_tokens(trial: Trial) -> float:
    """Return the share of chunks with several tokens; 0 where an engine guesses several."""
    if trial.point.flags.speculative_config:
        return 0.0
    later = [r.chunks.tokens[1:] for r in trial.measured_requests]
    return sum(k > 1 for k in itertools.chain(*later)) / max(1, sum(map(len, later)))


def lengths_differ(trial: Trial, _: Expected) -> Found:
    if different := [r for r in trial.answered if r.output_tokens != r.asked_tokens]:
        first = different[0]
        answers = counted(len(different), "answer")
        yield {"answers": answers, "got": first.output_tokens, "asked": first.asked_tokens}


def prompts_differ(trial: Trial, expected: Expected) -> Found:
    """Look at the engine's count of prompt tokens; an endpoint may have its own tokenizer."""
    off = OTHER_TOKENIZER if expected.endpoint else 0.0
    different = []
    for record in trial.answered:
        if record.index < len(trial.asked) and record.prompt_tokens is not None:
            asked = trial.asked[record.index].prompt_tokens
            if abs(record.prompt_tokens - asked) > off * asked:
                different.append((record.prompt_tokens, asked))
    if different:
        engine, asked = different[0]
        yield {"prompts": counted(len(different), "prompt"), "engine": engine, "asked": asked}


def other_model_answered(trial: Trial, expected: Expected) -> Found:
    """Find answers of another adapter, or of the base model, than was asked for.

    A record before this was recorded has no name; a new one that lacks it proves nothing.
    """
    wrong = []
    for record in trial.answered:
        if record.index < len(trial.asked) and (record.model or expected.served):
            wanted = trial.asked[record.index].adapter or expected.model
            if wanted and record.model != wanted:
                wrong.append((record.model or "one without a name", wanted))
    if wrong:
        model, wanted = wrong[0]
        answers = counted(len(wrong), "answer")
        yield {"answers": answers, "model": literal(model), "wanted": literal(wanted)}


def structure_broken(trial: Trial, _: Expected) -> Found:
    """Find answers that do not begin as the structure demands that was imposed on them."""
    structure = trial.point.workload.structure
    if not structure or not structure.imposed:
        return
    answers, odd = 0, list[str]()
    for record in trial.answered:
        if record.index < len(trial.asked) and (spec := trial.asked[record.index].structure):
            answers += 1
            if not begins_so(record.text or "", spec):
                odd.append(record.text or "")
    if odd:
        yield {"odd": len(odd), "answers": answers, "first": literal(odd[0][:60])}
