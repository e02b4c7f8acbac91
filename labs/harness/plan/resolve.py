"""Resolve and check what the reader asked for, before the first process starts."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from labs.harness.analysis.metrics import trial_metrics
from labs.harness.analysis.text import ADMISSION_BY_CLIENT, ceilings_text
from labs.harness.derived.lab_modules import findings_of, plot_names, probes_of
from labs.harness.plan import derived_models, recorded_machines
from labs.harness.plan.bounds import require_bounds
from labs.harness.plan.chat_writer import writer_of
from labs.harness.plan.load_processes import chosen_number, cores_for_clients, most_users
from labs.harness.plan.progress import ProgressDisplay
from labs.harness.plan.recorded_machines import MachineOnFile, largest_step
from labs.harness.plan.time_budget import Clock
from labs.harness.spec.errors import did_you_mean
from labs.harness.spec.lab import NO_TEXT, Claim, Forecast, Lab, LabError, NotApplicable, Point
from labs.harness.storage.bounded import read_json
from labs.harness.storage.recorded import MachineFile
from labs.harness.storage.results import RESULTS
from labs.harness.storage.writing import require_room, write_json
from loadtests.prompts import Writer
from loadtests.trace import TraceRow
from loadtests.workload import Workload
from serving.engines import ENGINES, engine_of
from serving.engines.base import EngineError, Unsupported
from serving.engines.endpoint import Endpoint
from serving.hardware import machine as machines
from serving.hardware.gpus import DATASHEETS, Datasheet
from serving.hardware.machine import IN_FLOAT32, SLOW_BF16, Ceilings, Environment, Machine
from serving.models import catalog, dummy
from serving.places import PROGRAM
from serving.simulator.datasheet import reason_against_sharing


@dataclass(frozen=True)
class RunRequest:
    """Holds what the reader asked for: a lab, and the settings of its run."""

    lab: Lab
    quick: bool = False
    aa: bool = False  # the lab's baseline against itself
    changes: dict[str, Any] = field(default_factory=dict)
    translated: Mapping[str, str] = field(default_factory=dict)  # commands that the lab is made of
    model: str = ""
    weights: str = ""  # `dummy`: random ones
    endpoint: str = ""
    replicas: Sequence[str] = ()  # the engines behind it, whose metrics are read
    resume: bool = False
    reproduces: str = ""  # the run whose resolved lab this is
    scale: str = ""  # of that lab; else this machine's
    engine_command: Sequence[str] = ()  # in the place of the engines' own
    card: str = ""  # a machine that is not here, by its name: it can only be forecast
    on_file: MachineOnFile | None = None  # that machine, where no GPU with a datasheet has the name
    trace: tuple[TraceRow, ...] = ()  # traffic that is forecast in place of the lab's own
    usd_per_hour: float | None = None  # the price of the machine
    unsafe_flags: bool = False  # flags are passed on that may load code or open an address
    clock: Clock = field(default_factory=Clock)  # without an end, unless the call has one


@dataclass(frozen=True)
class Setup:
    """Holds everything that a run needs, resolved and checked before anything starts."""

    lab: Lab
    machine: Machine
    ceilings: Ceilings
    model: catalog.Model
    points: list[Point]
    places: dict[str, Path]  # derived model -> its folder
    weights: dict[str, catalog.Model]  # variant -> what it serves, where it is not the model itself
    writer: Writer
    endpoint: Endpoint | None
    engine_command: Sequence[str]
    datasheet: Datasheet | None = None  # of the GPU that is not here
    on_file: MachineOnFile | None = None  # the machine that is not here
    keep_disturbed: bool = False  # a disturbed trial is not measured again
    blind: bool = False  # who watches is not to see which loads are sent
    clock: Clock = field(default_factory=Clock)
    quick: bool = False

    @property
    def elsewhere(self) -> bool:
        """Whether the machine is not here, so that nothing can be timed or started on it."""
        return self.datasheet is not None or self.on_file is not None

    @property
    def users(self) -> int:
        return max(p.load.seats for p in self.points)


def scale_of(request: RunRequest, machine: Machine) -> str:
    """Name the sizes that a run has: those of its machine, or of the run that it repeats.

    What an endpoint computes in is not this machine's to say: it is taken for BF16.
    """
    if request.on_file:
        return request.on_file.scale
    if request.scale:
        return request.scale
    scale = catalog.scale_of(machine)
    return "cpu" if request.endpoint and scale == catalog.CPU_FP32 else scale


def lab_of(request: RunRequest, scale: str) -> Lab:
    """Return the lab that is asked for, in its sizes; a recorded one has them, and its changes."""
    if request.reproduces:
        return request.lab
    lab = request.lab.at(scale, request.quick, request.changes, is_dummy(request.weights))
    lab = lab.replaying(request.trace) if request.trace else lab
    return lab.against_itself() if request.aa else lab


def resolve(request: RunRequest, progress: ProgressDisplay) -> Setup:
    """Check everything that can be checked before the first process starts."""
    if request.replicas and not request.endpoint:
        raise LabError("ENDPOINT_METRICS names replicas behind an ENDPOINT: give its address, too")
    keep_disturbed = keeps_disturbed()
    on_file = request.on_file
    machine, datasheet = (on_file.machine, None) if on_file else machine_of(request.card)
    lab = lab_of(request, scale_of(request, machine))
    if datasheet:  # there may be as many GPUs as are asked for
        machine = machine.model_copy(update={"count": max(f.devices for f in lab.all_flags)})
    require_known_names(lab, draws=not (datasheet or on_file))
    if not request.unsafe_flags:
        require_harmless(lab, bool(request.reproduces))
    require_devices(lab, machine)
    require_room(RESULTS)
    model = model_for(lab, machine, request.model, request.weights)
    if datasheet:
        require_shared_layers(lab, model, datasheet)
    if on_file:
        on_file.require(model)
        on_file = _covering(lab, model, on_file, progress)
    if model.dummy:
        require_no_reading(lab)
    if not request.engine_command:
        lab = with_engines_here(lab, machine, model, progress)
    writer = writer_of(model)
    lab = with_whole_prompts(lab, writer.least_tokens, progress)
    require_sizes(lab, model)
    endpoint = _endpoint(request, lab)
    if not endpoint:
        require_memory(lab, machine, model)
        if not (datasheet or on_file):
            require_compiler(lab, machine)
            if not request.engine_command:  # a stand-in keeps nothing
                require_host_memory(lab)
        lab = with_flags_here(lab, progress)
    lab = with_load_processes(lab, request, None if datasheet or on_file else machine, progress)
    if not (datasheet or on_file):
        require_bounds(lab, machine, model.shape, starts_engines=not endpoint)
    require_client_limits(lab)
    require_prompts(lab, writer)
    places, weights = _derived(lab, model, progress, request.quick)
    ceilings, about = _ceilings(machine, model, datasheet, on_file, progress)
    _introduce(machine, model, endpoint, about, progress)
    points = lab.points(
        model.shape,
        ceilings,
        {name: served.shape for name, served in weights.items()},
        {
            name: derived_models.about(path, model.shape.value_bytes)
            for name, path in places.items()
        },
    )
    return Setup(
        lab=lab,
        machine=machine,
        ceilings=ceilings,
        model=model,
        points=points,
        places=places,
        weights=weights,
        writer=writer,
        endpoint=endpoint,
        engine_command=request.engine_command,
        datasheet=datasheet,
        on_file=on_file,
        keep_disturbed=keep_disturbed,
        clock=request.clock,
        quick=request.quick,
    )


def _covering(
    lab: Lab, model: catalog.Model, on_file: MachineOnFile, progress: ProgressDisplay
) -> MachineOnFile:
    """Choose the machine's run that timed steps as large as this lab's; raises LabError."""
    needed = largest_step(lab.points(model.shape, on_file.ceilings))
    on_file = on_file.covering(needed)
    if needed > on_file.largest:
        progress.message(
            f"Steps of more than {on_file.largest:,} tokens, and here of up to {needed:,}, are"
            " extrapolated: none was timed there"
        )
    return on_file


def _ceilings(
    machine: Machine,
    model: catalog.Model,
    datasheet: Datasheet | None,
    on_file: MachineOnFile | None,
    progress: ProgressDisplay,
) -> tuple[Ceilings, str]:
    """Find a machine's ceilings, and tell them as text with where they are from."""
    if on_file:
        return on_file.ceilings, ceilings_text(on_file.ceilings, f"as the run {on_file.run} had it")
    if datasheet:
        each = "each, " if machine.count > 1 else ""
        ceilings = datasheet_ceilings(datasheet)
        return ceilings, ceilings_text(ceilings, f"{each}by its datasheet")
    ceilings = measured_ceilings(machine, model.shape.in_float32, progress)
    return ceilings, ceilings_text(ceilings)


def _endpoint(request: RunRequest, lab: Lab) -> Endpoint | None:
    """Return the endpoint that is asked for, once it has answered; None where engines are started.

    Raises LabError and EngineError.
    """
    if not request.endpoint:
        return None
    if len(lab.variants) > 1:
        raise LabError(
            f"{lab.name} compares engine settings, so it must start its own engines: leave"
            " ENDPOINT out"
        )
    endpoint = Endpoint(request.endpoint, request.replicas)
    endpoint.require_stream()
    return endpoint


def _derived(
    lab: Lab, model: catalog.Model, progress: ProgressDisplay, quick: bool
) -> tuple[dict[str, Path], dict[str, catalog.Model]]:
    """Make what the lab derives from the model: its folders, and what each variant then serves."""
    places = {
        name: derived_models.make(model, name, progress.message, quick, lab.made_here)
        for name in lab.derived()
    }
    weights = {
        v.name: derived_models.with_weights(model, v.served, places[v.served])
        for v in lab.variants
        if v.served
    }
    return places, weights


def _introduce(
    machine: Machine,
    model: catalog.Model,
    endpoint: Endpoint | None,
    ceilings: str,
    progress: ProgressDisplay,
) -> None:
    """Say what the lab is about to run on, with its ceilings as text."""
    progress.message(f"Machine: {machine.describe()}; {ceilings}")
    if machine.lacks_bf16 and not endpoint:
        progress.message(f"Note: {IN_FLOAT32 if model.shape.in_float32 else SLOW_BF16}")
    random_weights = ", random weights" if model.dummy else ""
    progress.message(
        f"Model: {model.name}, {model.shape.params / 1e6:,.0f} M parameters{random_weights}"
    )


def machine_of(card: str) -> tuple[Machine, Datasheet | None]:
    """Describe this machine, or one with the GPU that `card` names, with its datasheet.

    Raises LabError for a card without a datasheet.
    """
    if not card:
        return machines.detect(), None
    known = {sheet.short_name: (model, sheet) for model, sheet in DATASHEETS.items()}
    if card not in known:
        meant = did_you_mean(card, [*known, *(on_file := recorded_machines.named())])
        and_these = f", and of machines on file {', '.join(on_file)}" if on_file else ""
        raise LabError(f"there is no GPU {card!r}{meant} ones are {', '.join(known)}{and_these}")
    model, sheet = known[card]
    return Machine(kind="gpu", model=model, count=1, memory_bytes=sheet.memory_bytes), sheet


def datasheet_ceilings(sheet: Datasheet) -> Ceilings:
    """Present a datasheet's figures as ceilings, for the closed forms of a forecast."""
    return Ceilings(
        memory_bandwidth_bytes_per_s=sheet.memory_bandwidth_bytes_per_s,
        bf16_flops_per_s=sheet.bf16_flops_per_s,
        fp8_flops_per_s=sheet.fp8_flops_per_s,
        host_bytes_per_s=sheet.host_bytes_per_s,
        threads=1,
        torch="",
        measured_at="never: a datasheet's figures",
    )


def keeps_disturbed() -> bool:
    """Read DISTURBED: `keep` takes a trial as it is where others used the machine meanwhile.

    Raises LabError for another value.
    """
    text = os.environ.get("LABS_DISTURBED", "")
    if text not in ("", "keep"):
        raise LabError(
            f"DISTURBED={text} is not known: give DISTURBED=keep, which keeps disturbed trials, or"
            " leave it out: they are then measured again"
        )
    return bool(text)


def is_dummy(weights: str) -> bool:
    """Tell whether the setting WEIGHTS asks for random ones. Raises LabError for other values."""
    if weights not in ("", "dummy"):
        raise LabError(
            f"WEIGHTS={weights} is not known: use WEIGHTS=dummy, which serves random weights"
        )
    return bool(weights)


def model_of(machine: Machine, wanted: str, weights: str) -> catalog.Model:
    """Find the model that MODEL and WEIGHTS ask for on this machine.

    Raises ModelError and LabError.
    """
    if is_dummy(weights):
        catalog.bundled_tokenizer()  # prompts are written with it
        return dummy.resolve(machine, wanted)
    if wanted in dummy.SHAPES and not Path(wanted).exists():
        raise LabError(f"MODEL={wanted} is a shape without weights: give WEIGHTS=dummy with it")
    return catalog.resolve(machine, wanted)


def model_for(lab: Lab, machine: Machine, wanted: str, weights: str) -> catalog.Model:
    """Find the model that a lab serves: what MODEL and WEIGHTS ask for, or the lab's own shape.

    Its shape has the bytes that the lab's engines hold.
    Raises what `model_of` raises; NotApplicable where the lab serves a shape and MODEL names none.
    """
    if not lab.shape:
        return catalog.as_served(model_of(machine, wanted, weights), lab.value_bytes)
    is_dummy(weights)
    if wanted and wanted not in dummy.SHAPES:
        raise NotApplicable(
            f"{lab.name} serves random weights in a shape of its own, {lab.shape}, and MODEL="
            f"{wanted} is no shape that ships with the lab: leave MODEL out"
        )
    return catalog.as_served(model_of(machine, wanted or lab.shape, "dummy"), lab.value_bytes)


def require_harmless(lab: Lab, recorded: bool = False) -> None:
    """Check that no flag loads code, opens an address or names a path. Raises EngineError.

    `recorded` says that the lab comes from a folder of results.
    """
    for variant in lab.variants:
        if why := ENGINES[variant.engine].refusal(lab.flags_of(variant)):
            mend = (
                "a recorded run may come from anybody, so these flags are not passed on"
                if recorded
                else "if you know what it does, UNSAFE_FLAGS=1 passes it on"
            )
            raise EngineError(f"the flags of {variant.name} are refused: {why}; {mend}")


def require_devices(lab: Lab, machine: Machine) -> None:
    """Check that this machine has the devices that the engines' flags ask for.

    Raises EngineError; NotApplicable where no setting of the reader's would help.
    """
    for variant in lab.variants:
        try:
            flags = lab.flags_of(variant)
            engine_of(variant.engine, flags).require_devices(variant.name, flags, machine)
        except Unsupported as reason:
            raise NotApplicable(str(reason)) from reason


def gpus_used(lab: Lab) -> int | None:
    """Return how many of the visible GPUs the lab's engines use at most; None where any may be."""
    used = [ENGINES[v.engine].gpus_used(lab.flags_of(v)) for v in lab.variants]
    known = [n for n in used if n is not None]
    return max(known) if known == used else None


def with_whole_prompts(lab: Lab, least_tokens: int, progress: ProgressDisplay) -> Lab:
    """Lengthen the prompts of traces that are shorter than the chat template, and say how many."""
    workloads = []
    for workload in lab.workloads:
        trace = tuple((at_s, max(prompt, least_tokens), o) for at_s, prompt, o in workload.trace)
        if longer := sum(a != b for a, b in zip(trace, workload.trace, strict=True)):
            progress.message(
                f"Workload {workload.name}: {longer} prompts of its trace are shorter than the"
                f" model's chat template, and are sent with {least_tokens} tokens"
            )
        workloads.append(workload.model_copy(update={"trace": trace}) if longer else workload)
    return lab.model_copy(update={"workloads": tuple(workloads)})


def require_prompts(lab: Lab, writer: Writer) -> None:
    """Check that the tokenizer can write each workload's first prompt. Raises LabError."""
    for workload in lab.workloads:
        try:
            workload.requests(1, lab.seed, writer)
        except ValueError as error:
            raise LabError(f"workload {workload.name}: {error}") from error


def require_shared_layers(lab: Lab, model: catalog.Model, sheet: Datasheet) -> None:
    """Check that GPUs which are to share the model's layers can. Raises LabError."""
    for gpus in dict.fromkeys(flags.tensor_parallel_size for flags in lab.all_flags):
        if gpus < 1:
            raise LabError(f"tensor-parallel-size={gpus}: give 1 or more GPUs")
        if why := reason_against_sharing(model.shape, sheet, gpus):
            raise LabError(f"TP={gpus}: {why}")


def with_engines_here(
    lab: Lab, machine: Machine, model: catalog.Model, progress: ProgressDisplay
) -> Lab:
    """Leave out the variants whose engines cannot serve this model here, and say why.

    Raises what `absent_engines` raises.
    """
    reasons = absent_engines(lab, machine, model)
    for name, why in reasons.items():
        progress.message(f"Left out: {name}, as {why}")
    return lab.without(reasons)


def absent_engines(lab: Lab, machine: Machine, model: catalog.Model) -> dict[str, str]:
    """Say of each variant whose engine cannot serve this model here why: name -> reason.

    Raises EngineError where no variant is left, and NotApplicable where no claim is.
    """
    reasons = {
        variant.name: why
        for variant in lab.variants
        if (
            why := ENGINES[variant.engine].cannot_serve(
                model, lab.flags_of(variant), machine, derived_models.bits_of(variant.weights)
            )
        )
    }
    if len(reasons) == len(lab.variants):
        raise EngineError("; ".join(dict.fromkeys(reasons.values())))
    if lab.claims and not lab.without(reasons).claims:
        whys = "; ".join(dict.fromkeys(reasons.values()))
        raise NotApplicable(f"{lab.name} has nothing to compare here, as {whys}")
    return reasons


def require_compiler(lab: Lab, machine: Machine) -> None:
    """Check that a compiler is here where an engine compiles at its start. Raises EngineError."""
    for variant in lab.variants:
        ENGINES[variant.engine].require_compiler(variant.name, lab.flags_of(variant), machine)


def require_memory(lab: Lab, machine: Machine, model: catalog.Model) -> None:
    """Check that the device holds the weights and the memory that each variant asks for.

    Raises EngineError. A variant with weights of its own is not checked: the model's shape does not
    say how large those are.
    """
    for variant in lab.variants:
        if not variant.weights:
            engine, flags = ENGINES[variant.engine], lab.flags_of(variant)
            engine.require_memory(variant.name, flags, machine, model.shape)


def require_host_memory(lab: Lab) -> None:
    """Check that this host holds what each variant offloads to it. Raises EngineError."""
    for variant in lab.variants:
        ENGINES[variant.engine].require_host_memory(variant.name, lab.flags_of(variant))


def require_sizes(lab: Lab, model: catalog.Model) -> None:
    """Check that requests fit the model and the engines, and the engines' limits their memory.

    Raises LabError and EngineError.
    """
    longest = max(w.longest_tokens for w in lab.workloads)
    if longest > model.shape.max_positions:
        raise LabError(
            f"requests of up to {longest} tokens do not fit {model.name}'s"
            f" {model.shape.max_positions} positions: lower the lengths with SET="
        )
    for variant in lab.variants:
        sent = [w for w in lab.workloads if not w.only or variant.name in w.only]
        longest = max((w.longest_tokens for w in sent), default=0)
        engine, flags = ENGINES[variant.engine], lab.flags_of(variant)
        engine.require_sizes(variant.name, flags, model, longest)


def with_flags_here(lab: Lab, progress: ProgressDisplay) -> Lab:
    """Check the flags as `check_flags` does, and say so where the load generator holds limits."""
    checked = check_flags(lab)
    if checked.admission_by_client and any(flags.turns_away for flags in lab.all_flags):
        progress.message(f"Note: {ADMISSION_BY_CLIENT}")
    return checked


def check_flags(lab: Lab) -> Lab:
    """Check that each engine accepts the flags of its variants; return the lab as it runs here.

    Where an engine's version cannot limit its queue, the load generator does, for all variants.
    Raises EngineError; NotApplicable where the version lacks another flag.
    """
    for name in dict.fromkeys(v.engine for v in lab.variants):
        own = [v for v in lab.variants if v.engine == name]
        try:
            ENGINES[name].check_flags([lab.engine_flags_of(v) for v in own])
        except Unsupported as reason:
            if lab.admission_by_client or not any(flags.turns_away for flags in lab.all_flags):
                raise NotApplicable(str(reason)) from reason
            return check_flags(lab.model_copy(update={"admission_by_client": True}))
    return lab


def with_load_processes(
    lab: Lab, request: RunRequest, here: Machine | None, progress: ProgressDisplay
) -> Lab:
    """Choose how many processes send, unless the lab or the reader did, or a run is repeated.

    Say how many send where there are several; on a machine that is not here none does.
    """
    is_set = lab.sets_load_processes or "load_processes" in request.changes
    if not (is_set or request.reproduces):
        cores = cores_for_clients(here.kind) if here else None
        number = chosen_number(lab, cores)
        update = {"load_processes": number, "load_processes_chosen": number > 1}
        lab = lab.model_copy(update=update)
    if here and lab.load_processes > 1:
        users = f", of up to {most_users(lab)} users" if lab.load_processes_chosen else ""
        progress.message(f"Load: {lab.load_processes} processes send it{users}")
    return lab


def require_client_limits(lab: Lab) -> None:
    """Check that the load generator can hold the limits that are its own. Raises LabError."""
    if not lab.admission_by_client or not any(flags.turns_away for flags in lab.all_flags):
        return
    of_tokens = any(flags.max_num_queued_tokens is not None for flags in lab.all_flags)
    several = [workload.name for workload in lab.workloads if workload.choices > 1]
    if of_tokens and several:
        raise LabError(
            "the load generator cannot hold max-num-queued-tokens (admission_by_client) where a"
            f" request asks for several answers, as in {several[0]}: vLLM counts its prompt once"
            " for each, until that answer's first token. Leave that flag out, or ask for one answer"
        )


def require_known_names(lab: Lab, draws: bool = True) -> None:
    """Check the names that only other modules know; plots only where some are drawn.

    Raises LabError.
    """
    plots: Iterable[str] = lab.plots
    if draws:
        plots = plot_names(lab.name)
    parts: list[Claim | Forecast] = [*lab.claims, *lab.forecasts]
    for part in parts:
        if part.metric not in trial_metrics():
            known = ", ".join(trial_metrics())
            raise LabError(f"{part.name}: no metric {part.metric!r}; the known ones are {known}")
    for kind, names, known_names in (
        ("plot", lab.plots, plots),
        ("probe", lab.probes, probes_of(lab.name)),
        ("finding", lab.findings, findings_of(lab.name)),
    ):
        for name in names:
            if name not in known_names:
                raise LabError(f"no {kind} {name!r}; the known ones are {', '.join(known_names)}")


def require_no_reading(lab: Lab) -> None:
    """Check that no probe reads text, as random weights write none. Raises LabError."""
    known = probes_of(lab.name)
    if reading_probes := [name for name in lab.probes if known[name].reads_text]:
        raise LabError(f"{', '.join(reading_probes)}: {NO_TEXT}")


def measured_ceilings(machine: Machine, in_float32: bool, progress: ProgressDisplay) -> Ceilings:
    """Read the ceilings from machine.json; measure and keep them there where it is missing.

    Those of a model that is not served in float32 are without its rate, whatever the CPU lacks.
    Raises LabError where they cannot be measured.
    """
    path = RESULTS / machine.slug / "machine.json"
    ceilings = read_json(path, MachineFile).ceilings if path.exists() else None
    if ceilings is None or (machine.lacks_bf16 and ceilings.fp32_flops_per_s is None):
        rate = "float32" if machine.lacks_bf16 else "BF16"
        progress.message(f"Measuring memory bandwidth and {rate} rate (once a machine, about 15 s)")
        try:
            ceilings = machines.measure_ceilings(machine)
        except machines.CeilingsError as error:
            raise LabError(f"the ceilings could not be measured: {error}") from error
        write_json(path, MachineFile(machine=machine, ceilings=ceilings))
    return ceilings if in_float32 else ceilings.model_copy(update={"fp32_flops_per_s": None})


def engine_environment(kind: str, model: catalog.Model, lab: Lab) -> Environment:
    """Describe this machine's software, with the variables that an engine would get here."""
    environment = machines.environment(PROGRAM, kind)
    variables = dict(environment.variables)
    for name in dict.fromkeys(v.engine for v in lab.variants):
        own = ENGINES[name].environment(kind, model, lab.all_flags)
        variables |= machines.engine_variables(own)
    for variant in lab.variants:
        variables |= ENGINES[variant.engine].controls(lab.flags_of(variant))
    return environment.model_copy(update={"variables": variables})


def requests_file(work: Path, workload: Workload, repeat: int) -> Path:
    """Name the file of what a repeat sends of a workload."""
    return work / f"{workload.name}-{repeat}.jsonl"
