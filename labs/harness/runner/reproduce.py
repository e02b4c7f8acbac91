"""Ask for a recorded run again, from its manifest: does this machine measure the same?

The lab comes from the manifest, knob for knob, with its seeds; what predicts comes from the lab of
that name in this checkout. What the manifest names and this machine has otherwise is listed, the
likeliest cause of other figures first.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from labs import LABS
from labs.harness.plan.resolve import RunRequest, engine_environment, model_for, require_harmless
from labs.harness.spec.lab import Lab, LabError
from labs.harness.storage import manifest
from labs.harness.storage.manifest import Fact
from labs.harness.storage.recorded import Run, lab_from_resolved
from serving.hardware import machine as machines
from serving.models import catalog
from serving.models.dummy import SUFFIX

MODEL_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")  # on Hugging Face


def request(
    run: Run, model: str = "", resume: bool = False, engine_command: Sequence[str] = ()
) -> RunRequest:
    """Return the request that runs the same again. Raises LabError where this checkout cannot.

    Of what a manifest holds, only the lab, its sizes and the name of its model are used; its
    variables are compared and never set.
    """
    if run.endpoint:
        raise LabError(
            "this run was measured on an endpoint, which only its owner can start again: name"
            " a run whose engines the lab started, or run the lab anew with an ENDPOINT= of yours"
        )
    lab = _lab_of(run)
    require_harmless(lab, recorded=True)
    return RunRequest(
        lab=lab,
        quick=run.quick,
        changes=run.changes,
        model=model or _model_setting(run),
        weights="dummy" if run.dummy else "",
        resume=resume,
        reproduces=run.run_id,
        scale=run.scale,
        engine_command=engine_command,
    )


def _lab_of(run: Run) -> Lab:
    """Read the run's lab, with what predicts from this checkout. Raises LabError without that."""
    name, commit = run.lab["name"], run.environment.git_commit
    checkout_hint = (
        f"`git checkout {commit[:12]}` has it" if commit else "the commit is not on file"
    )
    if name not in LABS and not run.lab["claims"] and not run.lab["forecasts"]:
        return run.rebuilt_lab()  # nothing in it predicts, as of another tool's benchmark
    if name not in LABS:
        raise LabError(f"there is no lab {name} in this checkout: {checkout_hint}")
    current_lab = LABS[name]
    if run.dummy or run.aa:
        current_lab = current_lab.at(run.scale, run.quick, dummy=run.dummy)
    current_lab = current_lab.against_itself() if run.aa else current_lab
    without_prediction = [
        part["name"]
        for kind in ("claims", "forecasts")
        for part in run.lab[kind]
        if part["name"] not in [known.name for known in getattr(current_lab, kind)]
    ]
    if without_prediction:
        raise LabError(
            f"this checkout no longer predicts {', '.join(without_prediction)} of {name}:"
            f" {checkout_hint}"
        )
    try:
        return lab_from_resolved(run.lab, current_lab)
    except ValueError as error:
        raise LabError(
            f"this checkout can no longer read the run's lab ({str(error).splitlines()[0]}):"
            f" {checkout_hint}"
        ) from error


def _model_setting(run: Run) -> str:
    """Return the setting MODEL that serves what the run served."""
    if run.dummy:
        return run.model.removesuffix(SUFFIX)
    if run.model == catalog.default_name(machines.detect()):
        return ""
    return harmless_model(run.model)


def harmless_model(name: str) -> str:
    """Return the name of a model that others chose. Raises LabError where it is no id."""
    if name and (Path(name).exists() or not MODEL_ID.fullmatch(name)):
        raise LabError(
            f"it was made with the model {name!r}, which here would be a folder that its author"
            " chose: say which one to serve with MODEL="
        )
    return name


def differs_here(run: Run, run_request: RunRequest) -> list[Fact]:
    """List how this machine's environment differs from the run's, before anything starts."""
    host = machines.detect()
    model = model_for(run_request.lab, host, run_request.model, run_request.weights)
    run_here = run.model_copy(
        update={
            "machine": host,
            "environment": engine_environment(host.kind, model, run.rebuilt_lab()),
            "model": model.name,
            "model_revision": catalog.revision(model.path),
            "model_files": catalog.file_hashes(model.path),
        }
    )
    return manifest.differences(manifest.facts(run), manifest.facts(run_here))


def notes(run: Run, vllm_here: str) -> list[str]:
    """Say how this checkout and its vLLM differ from the run's, and how to use those instead."""
    sentences = []
    commit, its_vllm = run.environment.git_commit, run.environment.vllm
    if manifest.is_stale(run):
        sentences.append(
            "This checkout's lab has other settings by now; those of the run's manifest are used."
            + (f" To use its code too: git checkout {commit[:12]}" if commit else "")
        )
    if its_vllm and its_vllm != vllm_here:
        sentences.append(
            f"It ran on vLLM {its_vllm}; {vllm_here} is installed here. To use the same vLLM, in an"
            f" environment of its own: `make reproduce RUN=.. VLLM={its_vllm}`."
        )
    return sentences
