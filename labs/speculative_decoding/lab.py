"""Speculative decoding: what is asked of it. Words stand in page.md, sizes in sizes.toml."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from labs.harness.spec import theory
from labs.harness.spec.declare import claim, counter, falls, rises, sends, unchanged, users
from labs.harness.spec.lab import SLO, Claim, Lab, Point, PredictEffect, Prediction, Variant
from labs.harness.spec.theory import LEVIATHAN
from loadtests.prompts import Task
from loadtests.workload import Workload
from serving import metrics


def config(point: Point) -> dict[str, Any]:
    return point.flags.speculative_config


def verify_cost(point: Point) -> float:
    """Return v = t(B (g + 1)) / t(B) on the roofline: the cost of verifying g guesses."""
    tokens = point.load.users * (1 + config(point)["num_speculative_tokens"])
    step_s, verify_s = (
        theory.forward_s(point.shape, point.ceilings, n, point.kv_bytes())
        for n in (point.load.users, tokens)
    )
    return verify_s / step_s


def draft(point: Point) -> Mapping[str, Any]:
    """Return what the maker of the draft model or head recorded of it."""
    facts: Mapping[str, Any] = point.about[config(point)["model"].strip("<>")]
    return facts


def draft_cost(point: Point) -> float:
    """Return c, the draft's bytes / the target's."""
    if config(point)["method"] == "ngram":
        return 0.0
    return float(draft(point).get("weight_bytes", 0)) / point.shape.weight_bytes


def tpot_ratio(
    acceptance: Callable[[Point], float], lookup_share: Callable[[Point], float] | None = None
) -> PredictEffect:
    """Return the predictor of TPOT with guesses / without.

    `lookup_share` gives the share of steps that have guesses at all; None: all of them.
    """

    def predict(speculating: Point, plain: Point) -> Prediction:
        a, g = acceptance(speculating), config(speculating)["num_speculative_tokens"]
        c, v = draft_cost(speculating), verify_cost(speculating)
        f = lookup_share(speculating) if lookup_share else 1.0
        cost, tokens = "g c + v", "(1 - a^(g+1)) / (1 - a)"
        if lookup_share:
            cost, tokens = f"1 - f + f ({cost})", f"1 - f + f {tokens}"
        share = f"f = {f:.2f} of the steps have guesses, " if lookup_share else ""
        return Prediction(
            value=(1 - f + f * (g * c + v)) / (1 - f + f * theory.accepted_length(a, g)),
            formula=f"({cost}) / ({tokens})",
            assumptions=(
                f"{share}a = {a:.2f}, c = {c:.2f} by bytes, v = {v:.2f} on the roofline",
                "each token is accepted with the same probability, whatever came before",
            ),
            source=LEVIATHAN,
        )

    return predict


def within(records: Mapping[str, Any], point: Point) -> Mapping[str, Any]:
    """Choose what the maker recorded of answers as long as this point's, from tokens -> record."""
    long_enough = sorted(map(int, records))
    chosen = [n for n in long_enough if n >= point.output_tokens] or long_enough[-1:]
    record: Mapping[str, Any] = records[str(chosen[0])] if chosen else {}
    return record


def drafts_accepted(point: Point) -> float:
    """Return the share accepted on held-out prompts of this kind when it was made.

    A draft that was made without the kind has one share for all, one that was made before lengths
    were told apart has one for all lengths, and a published one is taken at 0.6.
    """
    made = draft(point)
    by_kind = within(made.get("acceptance_within", {}), point) or made.get("acceptance_by_kind", {})
    return float(by_kind.get(point.workload.task, by_kind.get("all", made.get("acceptance", 0.6))))


ASSUMED = {"quote": 0.9, "edit": 0.7, "code": 0.7}  # shares found, and accepted


def _copies(point: Point) -> tuple[float, float]:
    """Return (share of steps with something to copy, share accepted of what is copied).

    They are those of the target's own answers, as the draft's maker recorded them. Without such a
    record both are taken to be high for word-for-word copies, lower for edited ones, and low for
    open text.
    """
    records = [within(made.get("lookup_within", {}), point) for made in point.about.values()]
    task = point.workload.task
    assumed = ASSUMED.get(task, 0.2)
    lookup_share, accepted = next(
        ((r[task]["found"], r[task]["accepted"]) for r in records if task in r), (assumed, assumed)
    )
    return float(lookup_share), float(assumed if accepted is None else accepted)


def copies_found(point: Point) -> float:
    """Return the share of steps in which the context holds something to copy."""
    return _copies(point)[0]


def copies_accepted(point: Point) -> float:
    """Return the share of copied tokens that are accepted."""
    return _copies(point)[1]


by_draft = tpot_ratio(drafts_accepted)
by_copying = tpot_ratio(copies_accepted, copies_found)


def further(far: Point, near: Point) -> Prediction:
    """Predict the ratio of the formula for both ways to guess, at the load of both."""
    farther, nearer = by_draft(far, far), by_draft(near, near)
    return farther.model_copy(update={"value": farther.value / nearer.value})


def speculating(name: str, method: str, tokens: int, **more: Any) -> Variant:
    return Variant(
        name=name,
        flags={"speculative-config": {"method": method, "num_speculative_tokens": tokens, **more}},
    )


ONE = users(1)[0]
GUESSING = ("ngram", "draft-2", "draft-5", "eagle-2")


def asks(
    task: Task, prompt_tokens: int, output_tokens: int, guessing: Sequence[str], *loads: int
) -> Workload:
    only = ("none", *guessing)
    return sends(
        task, prompt_tokens, output_tokens, *users(*loads), task=task, keep_text=True, only=only
    )


CHOSEN = {f"accepts-{percent}": percent / 100 for percent in (30, 60, 80, 95)}


def chosen(point: Point) -> float:
    return CHOSEN[point.variant.name]


def accepted(point: Point) -> float:
    """Return the share that is accepted from what guesses at this point."""
    if point.variant.name in CHOSEN:
        return chosen(point)
    copies = config(point)["method"] == "ngram"
    return copies_accepted(point) if copies else drafts_accepted(point)


def guessed(point: Point) -> float:
    """Return the share of steps in which what guesses at this point finds anything to guess."""
    return copies_found(point) if config(point)["method"] == "ngram" else 1.0


def on_random_weights(lab: Lab) -> Lab:
    """Have the engine accept three guesses of a draft as often as a flag says."""
    guesses, many = 3, max(load.seats for load in lab.workloads[0].loads)
    variants = tuple(
        speculating(
            name,
            "draft_model",
            guesses,
            model="<draft>",
            rejection_sample_method="synthetic",
            # of each position: that it and all before it are accepted
            synthetic_acceptance_rates=[round(a**i, 4) for i in range(1, guesses + 1)],
        )
        for name, a in CHOSEN.items()
    )
    workloads = {w.name: w for w in lab.workloads if w.task not in ASSUMED}
    workloads["story"] = workloads["story"].model_copy(update={"only": ("none", *CHOSEN)})
    kept = [v for v in lab.variants if v.name in ("none", "draft-alone")]

    def at(load: int, name: str, expect: Literal["rises", "falls"]) -> Claim:
        gain = "shortens TPOT" if expect == "falls" else "costs more than it yields"
        title = f"With {name.removeprefix('accepts-')}% accepted a draft {gain}, {load} in flight"
        asked = f"{name} / none", "story", f"concurrent:{load}"
        made = claim(expect, f"{name}-at-{load}", "tpot_mean_s", *asked, by=tpot_ratio(chosen))
        return made.model_copy(update={"title": title})

    return lab.model_copy(
        update={
            "variants": (kept[0], *variants, *kept[1:]),
            "workloads": tuple(workloads.values()),
            "claims": (
                at(1, "accepts-30", "rises"),
                at(1, "accepts-60", "falls"),
                at(1, "accepts-80", "falls"),
                at(1, "accepts-95", "falls"),
                at(many, "accepts-30", "rises"),
                at(many, "accepts-95", "falls"),
            ),
            "evidence": (
                *(counter(metrics.SPEC_ACCEPTED, "rises", name) for name in CHOSEN),
                counter(metrics.SPEC_DRAFTS, "absent", "none"),
            ),
            "left_out": (*lab.left_out, "ngram and the texts to copy: there is nothing to copy"),
            "next_knobs": lab.next_knobs[-1:],  # the others turn variants that are not here
        }
    )


LAB = Lab(
    name="speculative-decoding",
    acceptance=accepted,
    guessed=guessed,
    answers=("SO-5",),
    variants=(
        Variant(name="none"),
        speculating("ngram", "ngram", 3, prompt_lookup_max=4, prompt_lookup_min=2),
        speculating("draft-2", "draft_model", 2, model="<draft>"),
        speculating("draft-5", "draft_model", 5, model="<draft>"),
        speculating("eagle-2", "eagle", 2, model="<eagle>"),
        Variant(name="draft-alone", weights="draft"),
    ),
    flags={
        "max-model-len": 512,
        "enable-prefix-caching": False,
        "enforce-eager": True,
        "kv-cache-memory-bytes": 512 * 2**20,
    },
    workloads=(
        asks("story", 64, 12, GUESSING, 1, 4, 8),
        asks("quote", 128, 12, GUESSING, 1),
        # what is edited begins to differ after some words; no draft was trained on it
        asks("edit", 128, 24, ["ngram"], 1),
        asks("code", 128, 24, ["ngram"], 1),
        sends("alone", 64, 12, *users(1), only=("draft-alone",)),
        sends("crowd", 32, 12, *users(24, 48), only=("none",), warmup_s=2),
    ),
    claims=(
        falls("ngram-quote", "tpot_mean_s", "ngram / none", "quote", ONE, by=by_copying),
        falls("ngram-edit", "tpot_mean_s", "ngram / none", "edit", ONE, by=by_copying),
        falls("ngram-code", "tpot_mean_s", "ngram / none", "code", ONE, by=by_copying),
        unchanged("ngram-story", "tpot_mean_s", "ngram / none", "story", ONE, by=by_copying),
        falls("draft-story", "tpot_mean_s", "draft-2 / none", "story", ONE, by=by_draft),
        falls("eagle-story", "tpot_mean_s", "eagle-2 / none", "story", ONE, by=by_draft),
        falls("eagle-draft", "tpot_mean_s", "eagle-2 / draft-2", "story", ONE, by=further),
        rises("draft-far", "tpot_mean_s", "draft-5 / draft-2", "story", ONE, by=further),
        rises("draft-crowd", "tpot_mean_s", "draft-5 / none", "story", "concurrent:8", by=by_draft),
    ),
    evidence=(
        *(
            counter(metric, "rises", name, task)
            for name in ("draft-2", "draft-5", "eagle-2")
            for task in ("story", "quote")
            for metric in (metrics.SPEC_DRAFTS, metrics.SPEC_ACCEPTED)
        ),
        counter(metrics.SPEC_ACCEPTED, "rises", "ngram", "quote"),
        counter(metrics.SPEC_DRAFTS, "rises", "ngram", "edit"),
        counter(metrics.SPEC_DRAFTS, "rises", "ngram", "code"),
        counter(metrics.SPEC_DRAFTS, "absent", "none"),
    ),
    findings=("acceptance", "speed-up", "same-text"),
    plots=("speculation", "variants"),
    needs_text=("same-text",),
    slo=SLO(ttft_s=1, tpot_s=0.1),
    requests=192,
    warmup_s=0.5,
    window_s=2,
    dummy=on_random_weights,
)
