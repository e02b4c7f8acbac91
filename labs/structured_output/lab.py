"""Structured output: what is asked of it. Its words stand in page.md, its sizes in sizes.toml."""

from __future__ import annotations

from typing import Any, Literal

from labs.harness import theory
from labs.harness.spec import (
    SLO,
    Arm,
    Claim,
    Evidence,
    Forecast,
    Lab,
    LabError,
    Point,
    Prediction,
    Variant,
)
from loadtests.arrivals import Concurrent
from loadtests.structures import Structure
from loadtests.workload import Fixed, Workload
from serving import metrics
from serving.forecasting.step import Masking, mask_threads

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
    forward_s = theory.decode_step_s(
        point.shape, point.ceilings, point.load.users, point.context_tokens
    )
    return max(forward_s, masks_s(point))


def step_ratio(treatment: Point, baseline: Point) -> Prediction:
    return Prediction(
        value=step_s(treatment) / step_s(baseline),
        formula="(t + max(0, B t_mask / threads - t)) / t, t = max(bytes / bandwidth, FLOP / rate)",
        assumptions=(
            "masks are filled on the host while the device computes the step",
            "up to 128 masks are filled one after another",
            "applying a mask, and taking a token into the grammar, cost nothing",
        ),
        source=MASK_SOURCE,
    )


def first_token_s(point: Point) -> float:
    compile_s = timed.compile_s if (timed := masking(point)) else 0.0
    return compile_s + theory.prefill_s(point.shape, point.ceilings, point.prompt_tokens)


def first_token_ratio(unseen: Point, seen: Point) -> Prediction:
    return Prediction(
        value=first_token_s(unseen) / first_token_s(seen),
        formula="(t_prefill + t_compile) / (t_prefill + t_cached)",
        assumptions=(
            "a request waits for its own grammar alone, and no step is under way",
            "prefill takes its FLOP at the measured rate",
        ),
        source=MASK_SOURCE,
    )


def first_token(point: Point) -> Prediction:
    return Prediction(
        value=first_token_s(point),
        kind="floor",
        formula="t_compile + FLOP / rate",
        assumptions=("no launch, scheduling or sampling cost",),
        source=MASK_SOURCE,
    )


def variant(backend: str, **more: Any) -> Variant:
    """Make an engine with this backend, compact in its JSON where it has a choice.

    With free white space a small model may fill an answer with it.
    """
    return Variant(name=backend, flags={"structured-outputs-config": {"backend": backend, **more}})


XGRAMMAR = variant("xgrammar", disable_any_whitespace=True)
VARIANTS = (
    XGRAMMAR, variant("guidance", disable_any_whitespace=True), variant("outlines"),
    variant("lm-format-enforcer"),
)  # fmt: skip
# the fourth backend is asked for one form alone: all forms of each would take too long
ALL_FORMS = tuple(v.name for v in VARIANTS[:3])
ONE, MANY = Concurrent(users=1), Concurrent(users=8)


def workload(
    name: str,
    structure: Structure,
    load: Concurrent = MANY,
    prompt_tokens: int = 160,
    output_tokens: int = 16,
    only: tuple[str, ...] = (),
) -> Workload:
    return Workload(
        name=name,
        prompt_tokens=Fixed(tokens=prompt_tokens),
        output_tokens=Fixed(tokens=output_tokens),
        structure=structure,
        keep_text=True,
        only=only,
        loads=(load,),
    )


ASKED = Structure(form="record", imposed=False)
IMPOSED = Structure(form="record")
UNSEEN = Structure(form="record", unseen=True)


def claim(
    name: str,
    treatment: tuple[str, str],
    baseline: tuple[str, str],
    expect: Literal["rises", "falls", "unchanged"] = "unchanged",
) -> Claim:
    """Claim something of one (variant, workload) beside another: TPOT, or TTFT of unseen ones."""
    (variant_, workload_), (variant_0, workload_0) = treatment, baseline
    cold = workload_ == "unseen"
    return Claim(
        name=name,
        metric="ttft_mean_s" if cold else "tpot_mean_s",
        treatment=Arm(variant=variant_, workload=workload_),
        baseline=Arm(variant=variant_0, workload=workload_0),
        expect=expect,
        predict=first_token_ratio if cold else step_ratio,
    )


WORKLOADS = (
    workload("asked", ASKED, only=("xgrammar",)),
    workload("imposed", IMPOSED),
    workload("nested", Structure(form="nested"), prompt_tokens=288, only=ALL_FORMS),
    workload("regex", Structure(form="regex"), prompt_tokens=96, only=ALL_FORMS),
    # few tokens: five answers to one user are to fit a window
    workload("asked-alone", ASKED, ONE, output_tokens=8, only=("xgrammar",)),
    workload("imposed-alone", IMPOSED, ONE, output_tokens=8, only=("xgrammar",)),
    workload("seen", IMPOSED, ONE, prompt_tokens=256, output_tokens=1),
    workload("unseen", UNSEEN, ONE, prompt_tokens=256, output_tokens=1),
)
COLD = ("seen", "unseen")
ON_CPU = tuple(
    w.model_copy(update={"only": ALL_FORMS}) if w.name in COLD else w
    for w in WORKLOADS
    if w.name not in ("nested", "regex")
)
"""For a CPU's little time: what no claim compares is left to the study of masks and to the probe of
whole answers, and the fourth backend is not asked how long a first answer waits."""
CLAIMS = (
    claim("mask", ("xgrammar", "imposed"), ("xgrammar", "asked")),
    claim("mask-alone", ("xgrammar", "imposed-alone"), ("xgrammar", "asked-alone")),
    claim("guidance", ("guidance", "imposed"), ("xgrammar", "imposed")),
    claim("outlines", ("outlines", "imposed"), ("xgrammar", "imposed")),
    claim("lm-format-enforcer", ("lm-format-enforcer", "imposed"), ("xgrammar", "imposed")),
    claim("unseen", ("xgrammar", "unseen"), ("xgrammar", "seen"), "rises"),
    claim("unseen-guidance", ("guidance", "unseen"), ("guidance", "seen")),
    claim("unseen-outlines", ("outlines", "unseen"), ("outlines", "seen"), "rises"),
    claim("unseen-lm-format-enforcer", ("lm-format-enforcer", "unseen"),
          ("lm-format-enforcer", "seen")),
)  # fmt: skip

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
    forecasts=(
        Forecast(name="unseen", metric="ttft_mean_s", arm=Arm(workload="unseen"),
                 predict=first_token),
    ),
    evidence=(
        Evidence(arm=Arm(), kind="stays", metric=metrics.PREEMPTIONS),
        *(
            Evidence.echo(v.name, metrics.ENGINE_CONFIG, "structured_outputs_backend", v.name)
            for v in VARIANTS
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
)  # fmt: skip
