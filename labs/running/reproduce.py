"""Did I get their numbers? A run on file is asked for again, from its manifest.

The lab comes from the manifest, knob for knob, with its seeds; what predicts comes from the lab of
that name in this checkout. What the manifest names and this machine has otherwise is listed, the
likeliest cause of other figures first.
"""

from __future__ import annotations

from collections.abc import Sequence

from labs import LABS
from labs.filing import manifest
from labs.filing.manifest import Fact
from labs.filing.results import Run, lab_from_resolved
from labs.lab import LabError
from labs.running.resolve import Request, engine_environment, model_of
from serving import machine as machines
from serving import models
from serving.dummy import SUFFIX


def request(
    run: Run, model: str = "", resume: bool = False, engine_command: Sequence[str] = ()
) -> Request:
    """What to ask for to run the same again; raises LabError where this checkout cannot."""
    name, commit = run.lab["name"], run.environment.git_commit
    there = f"`git checkout {commit[:12]}` has it" if commit else "the commit is not on file"
    if run.endpoint:
        raise LabError("it was measured on an endpoint: only its owner can bring that back")
    if name not in LABS:
        raise LabError(f"there is no lab {name} in this checkout: {there}")
    now = LABS[name]
    now = now.at(run.scale, run.quick, dummy=True) if run.dummy else now
    now = now.against_itself() if run.aa else now
    lost = [
        part["name"]
        for kind in ("claims", "forecasts")
        for part in run.lab[kind]
        if part["name"] not in [known.name for known in getattr(now, kind)]
    ]
    if lost:
        raise LabError(
            f"nothing in this checkout predicts {', '.join(lost)} of {name} any more: {there}"
        )
    try:
        lab = lab_from_resolved(run.lab, now)
    except ValueError as error:
        raise LabError(
            f"this checkout cannot read the run's lab any more ({str(error).splitlines()[0]}):"
            f" {there}"
        ) from error
    return Request(
        lab=lab,
        quick=run.quick,
        changes=run.changes,
        model=model or _asked_for(run),
        weights="dummy" if run.dummy else "",
        resume=resume,
        reproduces=run.run_id,
        engine_command=engine_command,
    )


def _asked_for(run: Run) -> str:
    """The MODEL that serves what the run served."""
    if run.dummy:
        return run.model.removesuffix(SUFFIX)
    return "" if run.model == models.default_name(machines.detect()) else run.model


def differs_here(run: Run, asked: Request) -> list[Fact]:
    """What of the run's environment this machine has otherwise, before anything starts."""
    host = machines.detect()
    model = model_of(host, asked.model, asked.weights)
    here = run.model_copy(
        update={
            "machine": host,
            "environment": engine_environment(host.kind, model, run.rebuilt_lab()),
            "model": model.name,
            "model_revision": models.revision(model.path),
            "model_files": models.file_hashes(model.path),
        }
    )
    return manifest.differences(manifest.facts(run), manifest.facts(here))


def notes(run: Run, here: str) -> list[str]:
    """How this checkout and its vLLM (`here`) depart from the run's, and how to have those too."""
    out = []
    commit, there = run.environment.git_commit, run.environment.vllm
    if manifest.is_stale(run):
        out.append(
            "This checkout's lab has other knobs by now; the run's own are used, from its manifest."
            + (f" To use its code too: git checkout {commit[:12]}" if commit else "")
        )
    if there and there != here:
        out.append(
            f"It ran on vLLM {there}, here is {here}: `make reproduce RUN=.. VLLM={there}` runs on"
            " the same, in an environment of its own."
        )
    return out
