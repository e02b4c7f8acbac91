"""Speculative decoding: what is asked of it. Words stand in page.md, sizes in sizes.toml."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from labs.harness import theory
from labs.harness.spec import SLO, Arm, Claim, Evidence, Lab, Point, Prediction, Variant
from loadtests.arrivals import Concurrent
from loadtests.prompts import Task
from loadtests.workload import Fixed, Workload
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
    """Return what the draft model's maker recorded of it."""
    facts: Mapping[str, Any] = point.about[config(point)["model"].strip("<>")]
    return facts


def draft_cost(point: Point) -> float:
    """Return c, the draft's bytes / the target's."""
    if config(point)["method"] == "ngram":
        return 0.0
    return float(draft(point).get("weight_bytes", 0)) / point.shape.weight_bytes


def tpot_ratio(
    acceptance: Callable[[Point], float], lookup_share: Callable[[Point], float] | None = None
) -> Callable[[Point, Point], Prediction]:
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
            source="Leviathan, Kalman, Matias, ICML 2023",
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


def further(far: Point, near: Point) -> Prediction:
    """Predict the ratio of the formula at both draft lengths, at the load of both."""
    alone = tpot_ratio(drafts_accepted)
    farther, nearer = alone(far, far), alone(near, near)
    return farther.model_copy(update={"value": farther.value / nearer.value})


def speculating(name: str, method: str, tokens: int, **more: Any) -> Variant:
    return Variant(
        name=name,
        flags={"speculative-config": {"method": method, "num_speculative_tokens": tokens, **more}},
    )


GUESSING = ("ngram", "draft-2", "draft-5")


def workload(
    task: Task,
    prompt_tokens: int,
    *loads: int,
    output_tokens: int = 12,
    guessing: tuple[str, ...] = GUESSING,
) -> Workload:
    return Workload(
        name=task,
        prompt_tokens=Fixed(tokens=prompt_tokens),
        output_tokens=Fixed(tokens=output_tokens),
        task=task,
        keep_text=True,
        only=("none", *guessing),
        loads=tuple(Concurrent(users=n) for n in loads),
    )


def claim(
    name: str, variant: str, task: Task, load: int, expect: str,
    acceptance: Callable[[Point], float], lookup_share: Callable[[Point], float] | None = None,
    title: str = "",
) -> Claim:  # fmt: skip
    arm = {"workload": task, "load": f"concurrent:{load}"}
    return Claim.model_validate(
        {
            "name": name,
            "title": title,
            "metric": "tpot_mean_s",
            "treatment": {"variant": variant, **arm},
            "baseline": {"variant": "none", **arm},
            "expect": expect,
            "predict": tpot_ratio(acceptance, lookup_share),
        }
    )


CHOSEN = {f"accepts-{percent}": percent / 100 for percent in (30, 60, 80, 95)}


def chosen(point: Point) -> float:
    return CHOSEN[point.variant.name]


def accepted(point: Point) -> float:
    """Return the share that is accepted from what guesses at this point."""
    if point.variant.name in CHOSEN:
        return chosen(point)
    by_copying = config(point)["method"] == "ngram"
    return copies_accepted(point) if by_copying else drafts_accepted(point)


def guessed(point: Point) -> float:
    """Return the share of steps in which what guesses at this point finds anything to guess."""
    return copies_found(point) if config(point)["method"] == "ngram" else 1.0


def on_random_weights(lab: Lab) -> Lab:
    """Have the engine accept three guesses of a draft as often as a flag says."""
    guesses, many = 3, max(load.seats for load in lab.workloads[0].loads)
    variants = tuple(
        speculating(
            name, "draft_model", guesses, model="<draft>", rejection_sample_method="synthetic",
            # of each position: that it and all before it are accepted
            synthetic_acceptance_rates=[round(a**i, 4) for i in range(1, guesses + 1)],
        )
        for name, a in CHOSEN.items()
    )  # fmt: skip
    workloads = {w.name: w for w in lab.workloads if w.task not in ASSUMED}
    workloads["story"] = workloads["story"].model_copy(update={"only": ("none", *CHOSEN)})
    kept = [v for v in lab.variants if v.name in ("none", "draft-alone")]

    def at(name: str, load: int, expect: str) -> Claim:
        gain = "shortens TPOT" if expect == "falls" else "costs more than it yields"
        title = f"With {name.removeprefix('accepts-')}% accepted a draft {gain}, {load} in flight"
        return claim(f"{name}-at-{load}", name, "story", load, expect, chosen, title=title)

    return lab.model_copy(
        update={
            "variants": (kept[0], *variants, *kept[1:]),
            "workloads": tuple(workloads.values()),
            "claims": (
                at("accepts-30", 1, "rises"),
                *(at(name, 1, "falls") for name in ("accepts-60", "accepts-80", "accepts-95")),
                at("accepts-30", many, "rises"),
                at("accepts-95", many, "falls"),
            ),
            "evidence": (
                *(
                    Evidence(arm=Arm(variant=name), kind="rises", metric=metrics.SPEC_ACCEPTED)
                    for name in CHOSEN
                ),
                Evidence(arm=Arm(variant="none"), kind="absent", metric=metrics.SPEC_DRAFTS),
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
        Variant(name="draft-alone", weights="draft"),
    ),
    flags={
        "max-model-len": 512,
        "enable-prefix-caching": False,
        "enforce-eager": True,
        "kv-cache-memory-bytes": 512 * 2**20,
    },
    workloads=(
        workload("story", 64, 1, 4, 8),
        workload("quote", 128, 1),
        # what is edited begins to differ after some words; no draft was trained on it
        workload("edit", 128, 1, output_tokens=24, guessing=("ngram",)),
        workload("code", 128, 1, output_tokens=24, guessing=("ngram",)),
        Workload(
            name="alone",
            prompt_tokens=Fixed(tokens=64),
            output_tokens=Fixed(tokens=12),
            only=("draft-alone",),
            loads=(Concurrent(users=1),),
        ),
        Workload(
            name="crowd",
            prompt_tokens=Fixed(tokens=32),
            output_tokens=Fixed(tokens=12),
            only=("none",),
            warmup_s=2,
            loads=(Concurrent(users=24), Concurrent(users=48)),
        ),
    ),
    claims=(
        claim("ngram-quote", "ngram", "quote", 1, "falls", copies_accepted, copies_found),
        claim("ngram-edit", "ngram", "edit", 1, "falls", copies_accepted, copies_found),
        claim("ngram-code", "ngram", "code", 1, "falls", copies_accepted, copies_found),
        claim("ngram-story", "ngram", "story", 1, "unchanged", copies_accepted, copies_found),
        claim("draft-story", "draft-2", "story", 1, "falls", drafts_accepted),
        Claim(
            name="draft-far",
            metric="tpot_mean_s",
            treatment=Arm(variant="draft-5", workload="story", load="concurrent:1"),
            baseline=Arm(variant="draft-2", workload="story", load="concurrent:1"),
            expect="rises",
            predict=further,
        ),
        claim("draft-crowd", "draft-5", "story", 8, "rises", drafts_accepted),
    ),
    evidence=(
        *(
            Evidence(arm=Arm(variant=name, workload=task), kind="rises", metric=metric)
            for name in ("draft-2", "draft-5")
            for task in ("story", "quote")
            for metric in (metrics.SPEC_DRAFTS, metrics.SPEC_ACCEPTED)
        ),
        Evidence(
            arm=Arm(variant="ngram", workload="quote"), kind="rises", metric=metrics.SPEC_ACCEPTED
        ),
        *(
            Evidence(arm=Arm(variant="ngram", workload=task), kind="rises",
                     metric=metrics.SPEC_DRAFTS)
            for task in ("edit", "code")
        ),
        Evidence(arm=Arm(variant="none"), kind="absent", metric=metrics.SPEC_DRAFTS),
    ),
    findings=("acceptance", "speed-up", "same-text"),
    plots=("speculation", "variants"),
    needs_text=("same-text",),
    slo=SLO(ttft_s=1, tpot_s=0.1),
    requests=192,
    warmup_s=0.5,
    window_s=2,
    dummy=on_random_weights,
)  # fmt: skip
