"""Structured output: what is asked of it. Its words stand in page.md, its sizes in sizes.toml."""

from __future__ import annotations

from functools import partial
from typing import Any

from labs.harness.spec.declare import (
    counter,
    echoes,
    forecast,
    predicts,
    rises,
    sends,
    unchanged,
    users,
)
from labs.harness.spec.lab import SLO, Claim, Lab, LabError, Point, Variant
from labs.harness.spec.theory import prefill_of, step_of
from loadtests.structures import Structure
from serving import metrics
from serving.simulator.step import Masking, mask_threads

MASK_SOURCE = "Dong et al., XGrammar, MLSys 2025"


def masking(point: Point) -> Masking | None:
    """Look up what the study of masks has timed for this point.

    None where nothing is imposed, or nothing was timed. Raises LabError for a backend that was not
    timed, or cannot be used here.
    """
    structure, study = point.workload.structure, point.about.get("masks", {})
    if structure is None or not structure.imposed or not study:
        return None
    backend = point.flags.structured_outputs_backend
    timed = study.get("backends", {}).get(backend)
    if timed is None:
        known = ", ".join(study.get("backends", {}))
        raise LabError(f"structured-outputs-config: backend {backend!r} is none of {known}")
    if timed["error"]:
        raise LabError(
            f"structured-outputs-config: {backend} cannot be used with the vLLM that is installed"
            f" here ({timed['error']}): choose another backend, or leave its variant out with"
            " SET='variants=[..]'"
        )
    of_form = timed["forms"][structure.form]
    return Masking(
        compile_s=of_form["compile_s" if structure.unseen else "again_s"],
        mask_s=of_form["mask_s"],
        processors=study["processors"],
    )


def masks_s(point: Point) -> float:
    """Return the seconds of filling the masks of a whole batch for one token; 0 without masks."""
    if (timed := masking(point)) is None:
        return 0.0
    users = point.load.users
    return users * timed.mask_s / mask_threads(users, timed.processors)


def step_s(point: Point) -> float:
    """Return a decode step's seconds: the roofline's, or those of the masks where they are more."""
    return max(step_of(point), masks_s(point))


@predicts(
    "(t + max(0, B t_mask / threads - t)) / t, t = max(bytes / bandwidth, FLOP / rate)",
    "masks are filled on the host while the device computes the step",
    "up to 128 masks are filled one after another",
    "applying a mask, and taking a token into the grammar, cost nothing",
    source=MASK_SOURCE,
)
def step_ratio(treatment: Point, baseline: Point) -> float:
    return step_s(treatment) / step_s(baseline)


def first_token_s(point: Point) -> float:
    timed = masking(point)
    return (timed.compile_s if timed else 0.0) + prefill_of(point)


@predicts(
    "(t_prefill + t_compile) / (t_prefill + t_cached)",
    "a request waits for its own grammar alone, and no step is under way",
    "prefill takes its FLOP at the measured rate",
    source=MASK_SOURCE,
)
def first_token_ratio(unseen: Point, seen: Point) -> float:
    return first_token_s(unseen) / first_token_s(seen)


@predicts(
    "t_compile + FLOP / rate",
    "no launch, scheduling or sampling cost",
    source=MASK_SOURCE,
    kind="floor",
)
def first_token(point: Point) -> float:
    return first_token_s(point)


def variant(backend: str, **more: Any) -> Variant:
    """Make an engine with this backend, compact in its JSON where it has a choice.

    With free white space a small model may fill an answer with it.
    """
    return Variant(name=backend, flags={"structured-outputs-config": {"backend": backend, **more}})


XGRAMMAR = variant("xgrammar", disable_any_whitespace=True)
VARIANTS = (
    XGRAMMAR,
    variant("guidance", disable_any_whitespace=True),
    variant("outlines"),
    variant("lm-format-enforcer"),
)
# the fourth backend is asked for one form alone: all forms of each would take too long
ALL_FORMS = tuple(v.name for v in VARIANTS[:3])
ONE, MANY = users(1, 8)

ASKED = Structure(form="record", imposed=False)
IMPOSED = Structure(form="record")
UNSEEN = Structure(form="record", unseen=True)


sends_kept = partial(sends, keep_text=True)  # what an answer begins with proves its structure
WORKLOADS = (
    sends_kept("asked", 160, 16, MANY, structure=ASKED, only=("xgrammar",)),
    sends_kept("imposed", 160, 16, MANY, structure=IMPOSED),
    sends_kept("nested", 288, 16, MANY, structure=Structure(form="nested"), only=ALL_FORMS),
    sends_kept("regex", 96, 16, MANY, structure=Structure(form="regex"), only=ALL_FORMS),
    # few tokens: five answers to one user are to fit a window
    sends_kept("asked-alone", 160, 8, ONE, structure=ASKED, only=("xgrammar",)),
    sends_kept("imposed-alone", 160, 8, ONE, structure=IMPOSED, only=("xgrammar",)),
    sends_kept("seen", 256, 1, ONE, structure=IMPOSED),
    sends_kept("unseen", 256, 1, ONE, structure=UNSEEN),
)
TPOT, TTFT, BOTH = "tpot_mean_s", "ttft_mean_s", "unseen / seen"
COLD = ("seen", "unseen")
ON_CPU = tuple(
    w.model_copy(update={"only": ALL_FORMS}) if w.name in COLD else w
    for w in WORKLOADS
    if w.name not in ("nested", "regex")
)
"""For a CPU's little time: what no claim compares is left to the study of masks and to the probe of
whole answers, and the fourth backend is not asked how long a first answer waits."""


def beside_xgrammar(backend: str) -> Claim:
    return unchanged(backend, TPOT, f"{backend} / xgrammar", "imposed", by=step_ratio)


CLAIMS = (
    unchanged("mask", TPOT, "xgrammar", "imposed / asked", by=step_ratio),
    unchanged("mask-alone", TPOT, "xgrammar", "imposed-alone / asked-alone", by=step_ratio),
    beside_xgrammar("guidance"),
    beside_xgrammar("outlines"),
    beside_xgrammar("lm-format-enforcer"),
    rises("unseen", TTFT, "xgrammar", BOTH, by=first_token_ratio),
    unchanged("unseen-guidance", TTFT, "guidance", BOTH, by=first_token_ratio),
    rises("unseen-outlines", TTFT, "outlines", BOTH, by=first_token_ratio),
    unchanged("unseen-lm-format-enforcer", TTFT, "lm-format-enforcer", BOTH, by=first_token_ratio),
)

LAB = Lab(
    name="structured-output",
    answers=("SO-6",),
    variants=VARIANTS,
    flags={
        "max-model-len": 1024,
        "enable-prefix-caching": False,
        "enforce-eager": True,
        "kv-cache-memory-bytes": 512 * 2**20,
    },
    workloads=WORKLOADS,
    claims=CLAIMS,
    forecasts=(forecast("unseen", TTFT, first_token, workload="unseen"),),
    evidence=(
        counter(metrics.PREEMPTIONS, "stays"),
        *echoes(
            metrics.ENGINE_CONFIG, "structured_outputs_backend", {v.name: v.name for v in VARIANTS}
        ),
    ),
    masking=masking,
    studies=("masks",),
    probes=("structures",),
    findings=("validity", "overhead", "first-token", "masks"),
    plots=("structures",),
    needs_text=("structures", "structures-quick", "validity", "first-token"),
    slo=SLO(ttft_s=2, tpot_s=0.15),
    requests=96,
    repeats=4,
    warmup_s=0.6,
    window_s=2.8,
    scales={
        "cpu": {
            "workloads": [w.model_dump() for w in ON_CPU],
            "claims": tuple(c for c in CLAIMS if c.name != "unseen-lm-format-enforcer"),
        },
    },
)
