"""Checks that the engine shows what the point asks for, in the dose that was predicted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from labs.harness.analysis import expected_treatment
from labs.harness.analysis.checks.expected import TOKENIZE_S, TRANSPORT_S, Expected, Found, Served
from labs.harness.analysis.measure import Trial, counter_increase, expected_pieces
from labs.harness.analysis.metrics import METRICS
from labs.harness.analysis.text import counted, literal, number
from labs.harness.spec.lab import Evidence
from serving import metrics
from serving.engines import DEFAULT_ENGINE
from serving.plugins import random_weights

ECHOED = {  # flag -> the info metric and the label under which the engine says it again
    "enable-prefix-caching": (metrics.CACHE_CONFIG, "enable_prefix_caching"),
    "block-size": (metrics.CACHE_CONFIG, "block_size"),
    "kv-cache-memory-bytes": (metrics.CACHE_CONFIG, "kv_cache_memory_bytes"),
    "kv-cache-dtype": (metrics.CACHE_CONFIG, "cache_dtype"),
    "enforce-eager": (metrics.ENGINE_CONFIG, "enforce_eager"),
    "replicas": (metrics.ROUTER, "replicas"),
    "router-policy": (metrics.ROUTER, "policy"),
    "router-balance-abs-threshold": (metrics.ROUTER, "balance_abs_threshold"),
}
ARGUMENTS = {  # flags that a server's log names, unless they have vLLM's default
    "async-scheduling": None,
    "attention-backend": None,
    "enable-chunked-prefill": None,
    "max-cpu-loras": None,
    "max-lora-rank": "16",
    "max-loras": "1",
    "max-model-len": None,
    "max-num-batched-tokens": None,
    "max-num-queued-reqs": None,
    "max-num-queued-tokens": None,
    "max-num-seqs": None,
    "num-gpu-blocks-override": None,
    "scheduling-policy": "fcfs",
}


# ------------------------------------------------------------------------------ the prefix cache


def block_unknown(trial: Trial, expected: Expected) -> Found:
    if _hits(trial) is not None and _bounds(trial, expected) is None and not expected.endpoint:
        yield {}


def cached_too_much(trial: Trial, expected: Expected) -> Found:
    hits, bounds = _hits(trial), _bounds(trial, expected)
    if hits is not None and bounds and hits > bounds.high:
        least = 0 if expected.endpoint else bounds.low  # whether it caches was not set here
        yield {"hits": hits, "bounds": expected_treatment.Bounds(least, bounds.high)}


def cached_too_little(trial: Trial, expected: Expected) -> Found:
    hits, bounds = _hits(trial), _bounds(trial, expected)
    if hits is not None and bounds and hits < bounds.low and not expected.endpoint:
        yield {"hits": hits, "bounds": bounds}


def _hits(trial: Trial) -> float | None:
    return counter_increase(trial, metrics.PREFIX_HITS)


def _bounds(trial: Trial, expected: Expected) -> expected_treatment.Bounds | None:
    return trial.once(expected_treatment.cached_tokens, expected.template_tokens)


# ------------------------------------------------------------------------------------- the flags


def flag_not_echoed(trial: Trial, expected: Expected) -> Found:
    """Find flags that the engine says it runs with in another way, or not at all.

    Its log was not read in old runs, and another engine says nothing of vLLM's flags.
    """
    if trial.point.variant.engine != DEFAULT_ENGINE:
        return
    for flag, (metric, label) in ECHOED.items():
        labels = trial.info(metric)
        if flag in trial.point.flags and (labels or expected.served):
            wanted, echoed = str(trial.point.flags[flag]), labels.get(label)
            # `fp8` stands for a type of the engine's choice, which it names in full
            if echoed != wanted and not (wanted == "fp8" and str(echoed).startswith("fp8")):
                yield {"label": label, "said": echoed, "wanted": wanted}


def flag_given_otherwise(trial: Trial, expected: Expected) -> Found:
    given = _given(trial, expected)
    if given is None:
        return
    for flag, default in ARGUMENTS.items():
        name, flags = flag.replace("-", "_"), trial.point.engine_flags
        said = given.get(name, default)
        if flag in flags and said != str(flags[flag]):
            yield {"flag": name, "said": said, "wanted": flags[flag]}


def flag_given_unasked(trial: Trial, expected: Expected) -> Found:
    given = _given(trial, expected) or {}
    for flag in ARGUMENTS:
        name = flag.replace("-", "_")
        if flag not in trial.point.engine_flags and name in given:
            yield {"flag": name, "said": given[name]}


def _given(trial: Trial, expected: Expected) -> Mapping[str, str] | None:
    """Return what the server says it was given; None in old runs, which did not read its log."""
    if not trial.engine or not expected.served or trial.point.variant.engine != DEFAULT_ENGINE:
        return None
    return trial.engine.info.get(metrics.ENGINE_ARGUMENTS)


# ----------------------------------------------------------------------------------- the weights


def _weights(trial: Trial, expected: Expected) -> Served | None:
    return expected.served.get(trial.point.variant.name)


def _quantization(trial: Trial) -> str | None:
    return trial.info(metrics.ENGINE_CONFIG).get("quantization")


def other_files(trial: Trial, expected: Expected) -> Found:
    wanted, served = _weights(trial, expected), trial.info(metrics.SERVED)
    if wanted and served.get("files_sha256") != wanted.files_sha256:
        yield {"folder": literal(served.get("folder", "it names none"))}


def quantization_unknown(trial: Trial, expected: Expected) -> Found:
    if _weights(trial, expected) and _quantization(trial) is None:
        yield {}


def not_quantized(trial: Trial, expected: Expected) -> Found:
    wanted = _weights(trial, expected)
    if wanted and wanted.quantized and _quantization(trial) == "None":
        yield {"method": "None"}


def quantized(trial: Trial, expected: Expected) -> Found:
    wanted, method = _weights(trial, expected), _quantization(trial)
    if wanted and not wanted.quantized and method not in (None, "None"):
        yield {"method": method}


def random_zeros(trial: Trial, expected: Expected) -> Found:
    wanted = _weights(trial, expected)
    if wanted and wanted.random and (fault := random_weights.fault(trial.info(metrics.ZEROS))):
        yield {"fault": fault}


# --------------------------------------------------------------------------------- the guesses


def _guesses(trial: Trial) -> expected_treatment.Guesses | None:
    return expected_treatment.Guesses.of(trial) if trial.point.flags.speculative_config else None


def drafts_uncounted(trial: Trial, _: Expected) -> Found:
    if trial.point.flags.speculative_config and _guesses(trial) is None:
        yield {}


def drafted_otherwise(trial: Trial, _: Expected) -> Found:
    guesses = _guesses(trial)
    if guesses and not (bounds := guesses.drafted_bounds()).hold(guesses.drafted):
        yield {"drafted": guesses.drafted, "bounds": bounds}


def drafts_do_not_add_up(trial: Trial, _: Expected) -> Found:
    guesses = _guesses(trial)
    bounds = guesses.yield_bounds(trial) if guesses else None
    if guesses and bounds and not bounds.hold(guesses.drafts + guesses.accepted):
        yield {"drafts": guesses.drafts, "accepted": guesses.accepted, "bounds": bounds}


def accepted_otherwise(trial: Trial, expected: Expected) -> Found:
    """Compare the share of drafted tokens that were accepted with what was predicted."""
    guesses, key = _guesses(trial), trial.point.key
    if not guesses or not guesses.drafted:
        return
    bounds = None
    if key in expected.least_copied:
        bounds = expected_treatment.copied_share(expected.least_copied[key])
    elif key in expected.acceptance:
        bounds = guesses.accepted_bounds(expected.acceptance[key], trial)
    share = guesses.accepted / guesses.drafted
    if bounds and not bounds.hold(share):
        yield {"share": share, "low": bounds.low, "high": bounds.high}


# ---------------------------------------------------------------------------- the lab's evidence


def _asked(trial: Trial, expected: Expected, kind: str) -> Iterator[Evidence]:
    for item in expected.evidence:
        if item.kind == kind and item.arm.matches(trial.point):
            yield item


def label_differs(trial: Trial, expected: Expected) -> Found:
    for item in _asked(trial, expected, "echoes"):
        said, wanted = trial.info(item.metric).get(item.label), item.expected(trial.point)
        if said != wanted:
            yield {"label": item.label, "said": literal(str(said)), "wanted": wanted or "nothing"}


def counter_present(trial: Trial, expected: Expected) -> Found:
    for item in _asked(trial, expected, "absent"):
        if counter_increase(trial, item.metric) is not None:
            yield {"metric": item.metric}


def counter_missing(trial: Trial, expected: Expected) -> Found:
    for kind in ("rises", "stays"):
        for item in _asked(trial, expected, kind):
            if _increase(item, trial) is None:
                yield {"metric": item.metric}


def counter_stayed(trial: Trial, expected: Expected) -> Found:
    for item in _asked(trial, expected, "rises"):
        increase = _increase(item, trial)
        if increase is not None and increase <= 0:
            yield {"counter": _counter(item, trial)}


def counter_rose(trial: Trial, expected: Expected) -> Found:
    for item in _asked(trial, expected, "stays"):
        if increase := _increase(item, trial):
            yield {"counter": _counter(item, trial), "increase": increase}


def _increase(evidence: Evidence, trial: Trial) -> float | None:
    if _is_of_client(evidence, trial):
        return sum(r.turned_away for r in trial.records)
    return counter_increase(trial, evidence.metric)


def _counter(evidence: Evidence, trial: Trial) -> str:
    if _is_of_client(evidence, trial):
        return "the client's count of requests turned away"
    return f"the engine's {evidence.metric}"


def _is_of_client(evidence: Evidence, trial: Trial) -> bool:
    """Tell whether the client's records have what was turned away: the engine has no limit.

    vLLM counts that since it has limits: before, a missing counter proves nothing, and the client
    sees what is refused.
    """
    if evidence.metric != metrics.TURNED_AWAY:
        return False
    counts = counter_increase(trial, evidence.metric) is not None
    return trial.point.admission_by_client or not (counts or trial.point.flags.turns_away)


def no_pieces(trial: Trial, expected: Expected) -> Found:
    for item in _asked(trial, expected, "pieces"):
        if METRICS[item.metric].of(trial) is None:
            yield {}


def other_pieces(trial: Trial, expected: Expected) -> Found:
    """Compare in how many pieces a long prompt came with how many its budget makes."""
    for item in _asked(trial, expected, "pieces"):
        pieces, wanted = METRICS[item.metric].of(trial), expected_pieces(trial.point)
        most = 1.3 * wanted + _steps_before(trial)
        if pieces is not None and not 0.7 * wanted <= pieces <= most:
            yield {"pieces": number(pieces), "wanted": counted(wanted, "piece")}


def _steps_before(trial: Trial) -> float:
    """Estimate at most how many steps pass between a long prompt's send and its first piece.

    These are one or two where steps are long; a GPU takes several while the prompt is parsed and
    tokenized.
    """
    intruder, step_s = trial.point.workload.intruder, METRICS["itl_p50_s"].of(trial)
    if not intruder or not step_s:
        return 2.5
    delay_s = TRANSPORT_S + TOKENIZE_S * intruder.prompt_tokens
    return max(2.5, 1 + delay_s / step_s)
