"""A machine that is not here but on file: what a run measured on it stands for it in a forecast.

Of such a machine are on file its memory and ceilings, how far its speed varied, and the stand-in
step that a run timed there before its engine started. A step is one model's, so only that model can
be forecast. Steps of quantized weights, adapters and draft models are on file without a name, so
that only runs count whose engines all had one step, the model's own.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from labs.harness.spec.lab import Lab, LabError, Point
from labs.harness.spec.names import PointName
from labs.harness.storage import results
from labs.harness.storage.results import RunFolder, readable
from serving.engines import DEFAULT_ENGINE
from serving.engines.vllm_flags import VllmFlags
from serving.hardware.machine import Ceilings, Machine
from serving.models import catalog, dummy
from serving.models.catalog import Model, ModelError, Shape, as_served
from serving.simulator.step import StepTimes

DEFAULT_BUDGET_TOKENS = 2048  # of vLLM 0.32 on a CPU; larger steps are extrapolated
MOST_EXTRAPOLATED = 2
"""A step on file may be so many times as large as the largest that was timed.

In eleven tables on file that end at 2,048 tokens, the slope of the sizes below gives 0.77 to 1.05
of the time measured there, in the middle 0.94; both ends of a band are about as far off.
"""


def largest_step(points: Sequence[Point]) -> int:
    """Count the tokens of the largest possible step: all users' prompts, within the budget."""
    return max(
        min(
            VllmFlags(
                {"max-num-batched-tokens": DEFAULT_BUDGET_TOKENS} | p.variant.flags
            ).max_num_batched_tokens,
            p.sequences * max(prompt for prompt, _ in p.lengths),
        )
        for p in points
    )


@dataclass(frozen=True)
class MachineOnFile:
    """Holds what one run measured of its machine before its engines started."""

    run: str  # machine/lab/run
    machine: Machine
    scale: str  # whose sizes the run had
    ceilings: Ceilings
    model: str  # whose step was timed, as MODEL= names it
    dummy: bool  # its weights were random
    shape: Shape
    step: StepTimes
    spread: float  # the usual one of the machine's speed, a factor of 1 or more
    earlier: tuple[MachineOnFile, ...] = ()  # older runs that timed this model there, newest last

    @property
    def weights(self) -> str:
        """Return what WEIGHTS= was, which the same model needs again."""
        return "dummy" if self.dummy else ""

    def covering(self, tokens: int) -> MachineOnFile:
        """Return the newest of these runs that timed steps of so many tokens.

        Where none did, it is the one that comes nearest. Raises LabError where that timed so little
        that most of the steps would be extrapolated.
        """
        runs = (*self.earlier, self)
        nearest = max(enumerate(runs), key=lambda at: (min(tokens, at[1].largest), at[0]))[1]
        if tokens > MOST_EXTRAPOLATED * nearest.largest:
            raise LabError(
                f"this needs steps of up to {tokens:,} tokens, and the largest that the run"
                f" {nearest.run} timed has {nearest.largest:,}: name another run, or another"
                " machine, with MACHINE="
            )
        return nearest

    @property
    def largest(self) -> int:
        """The tokens of the largest step that was timed."""
        return self.step.tokens[-1]

    def require(self, model: Model) -> None:
        """Check that it is this model's step that was timed. Raises LabError."""
        if model.shape != self.shape:
            raise _refusal([self], model.name.removesuffix(dummy.SUFFIX))


def _refusal(timed: Sequence[MachineOnFile], model: str) -> LabError:
    known = " and ".join(dict.fromkeys(of.model for of in timed))
    return LabError(
        f"on {timed[0].machine.slug} the step of {known} was timed, which tells nothing of"
        f" {model}: leave MODEL out, or name a GPU by its datasheet with MACHINE="
    )


def find_machine(name: str, model: str = "") -> MachineOnFile | None:
    """Find the machine whose folder among the results, or one of whose runs, is named.

    Of a machine's runs the newest counts that timed this model's step (as MODEL= names it; any
    model's without a name), and the earlier ones are kept with it, for larger steps. Returns None
    where nothing on file has this name; raises LabError where no run there can stand for it.
    """
    places = (Path(name), catalog.ROOT / name, results.RESULTS / name)
    found = ((place, _runs_in(place)) for place in places if name and place.is_dir())
    home, runs = next(((place, runs) for place, runs in found if runs), (None, []))
    if home is None:
        return None
    timed, reasons = list[MachineOnFile](), list[str]()
    for folder in runs:
        try:
            with readable(folder):
                timed.append(_of(folder))
        except LabError as reason:
            reasons.append(str(reason))
    if not timed:
        raise LabError(f"nothing on file tells how long a step takes on {home.name}: {reasons[-1]}")
    of_model = _of_model(timed, model)
    if not of_model:
        raise _refusal(timed, model)
    *earlier, newest = of_model
    served = newest.model, newest.dummy, newest.shape
    alike = (of for of in earlier if (of.model, of.dummy, of.shape) == served)
    return replace(newest, earlier=tuple(alike))


def _of_model(timed: Sequence[MachineOnFile], model: str) -> list[MachineOnFile]:
    """List the runs that timed the model which MODEL= names, or one of the shape in a folder."""
    folder = Path(model)
    if not model or not folder.is_dir():
        return [of for of in timed if model in ("", of.model)]
    try:
        served = catalog.load(folder.resolve(), folder.name)
    except ModelError:  # a folder without weights may be served with random ones
        return [*timed]
    return [of for of in timed if of.shape == as_served(served, of.shape.value_bytes).shape]


def named() -> list[str]:
    """List the machines on file, as MACHINE= takes them."""
    return sorted({folder.machine_slug for folder in results.all_runs()})


def _runs_in(folder: Path) -> list[RunFolder]:
    """Return a machine's runs, the newest last, or the only run where the folder is one."""
    if (folder / "run.json").is_file():
        return [RunFolder(folder.resolve())]
    return results.runs_of(folder)


def _of(folder: RunFolder) -> MachineOnFile:
    """Read what a run measured of its machine; raises LabError where that is not one step."""
    run, forecasts = folder.run(), folder.predictions().in_virtual_time
    steps = forecasts.step_times if forecasts else []
    if not forecasts or not folder.complete or len(steps) != 1:
        several = f"{len(steps)} steps, and which is the model's own is not told"
        timed = several if len(steps) > 1 else "no step"
        raise LabError(f"the run {folder.path.name} timed {timed}")
    variants_forecast = {PointName.parse(key).variant for key in forecasts.points}
    if not _serves_the_model_alone(run.rebuilt_lab(), variants_forecast):
        raise LabError(f"the run {folder.path.name} timed no step of the model as it is")
    return MachineOnFile(
        run=folder.place,
        machine=run.machine,
        scale=run.scale,
        ceilings=run.ceilings,
        model=run.model.removesuffix(dummy.SUFFIX) if run.dummy else run.model,
        dummy=run.dummy,
        shape=Shape(**run.model_shape),
        step=StepTimes.model_validate(steps[0]),
        spread=forecasts.machine_spread,
    )


def _serves_the_model_alone(lab: Lab, forecast: Collection[str]) -> bool:
    """Tell whether one of these variants serves the model as it is, from one device."""
    return any(
        v.name in forecast
        and v.engine == DEFAULT_ENGINE
        and not v.weights
        and not flags.quantizes_cache
        and flags.devices == 1
        and not flags.get("enable-lora")
        for v, flags in zip(lab.variants, lab.all_flags, strict=True)
    )
