"""The command `all`: every lab in order, in one call or several, with a record of what is done."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import traceback
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import typer
from pydantic import BaseModel
from rich.markup import escape

from labs import FIRST, LABS
from labs.harness.cli.options import changes_of, command, command_words, price_of
from labs.harness.cli.run_lab import play
from labs.harness.cli.terminal import EXPECTED_ERRORS, console, errors, refusal_of, shown_path
from labs.harness.plan.resolve import RunRequest
from labs.harness.plan.time_budget import Clock, TimeUsedUp
from labs.harness.runner.resume import CannotResume
from labs.harness.site import leaderboards
from labs.harness.spec.errors import did_you_mean
from labs.harness.spec.lab import LabError, NotApplicable
from labs.harness.storage.archive import write_here
from labs.harness.storage.bounded import DamagedError, read_json
from labs.harness.storage.results import RESULTS, RunFolder
from labs.harness.storage.writing import moment, write_json
from serving import atomic
from serving.engines import ENGINES
from serving.engines.flags import Flags
from serving.engines.vllm import Vllm
from serving.hardware import machine as machines
from serving.hardware.machine import Machine
from serving.models.catalog import CACHE, ROOT, scale_of
from serving.processes.masking import recordable, tellable

FOLDER = CACHE
THE_SAME_CALL = "the same call (without FRESH=1)"


class Tried(BaseModel, extra="forbid"):
    """Records what became of a lab that was begun."""

    ended_early: int = 0  # how often it failed, or the call was killed in it
    run: str = ""  # the folder of its complete run


class Sitting(BaseModel, extra="forbid"):
    """Records which labs were begun and finished.

    Calls with other settings, or on another machine, have a record in another file.
    """

    machine: str  # its slug
    quick: bool
    model: str
    weights: str = ""
    changes: dict[str, Any] = {}  # by SET and TP
    vllm: str = ""
    results: str
    labs: dict[str, Tried] = {}
    starts_s: list[float] = []  # of the latest engines
    preparations_s: list[float] = []  # of the latest labs, from their begin to their first engine

    @property
    def file(self) -> Path:
        """Where the record lies: the name holds a digest of the settings and the machine."""
        settings = self.model_dump(mode="json", exclude={"labs", "starts_s", "preparations_s"})
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        return FOLDER / f"labs-all-{digest[:12]}.json"

    @property
    def done(self) -> dict[str, str]:
        """Map each lab that was finished to the folder of its run."""
        return {lab: tried.run for lab, tried in self.labs.items() if tried.run}

    def save(self) -> None:
        write_json(self.file, self)

    def begin(self, lab: str) -> bool:
        """Record that a lab is being run; true where it was begun before, so that it is resumed."""
        begun_before = lab in self.labs
        self.labs.setdefault(lab, Tried()).ended_early += 1  # a killed call cannot tell later
        self.save()
        return begun_before

    def excuse(self, lab: str) -> None:
        """Record that the last begin of a lab ended in a way that is not held against it."""
        self.labs[lab].ended_early -= 1
        self.save()

    def finish(self, lab: str, run: Path) -> None:
        """Record the folder of a lab's complete run."""
        self.labs[lab] = Tried(run=os.path.relpath(run, ROOT))
        self.save()

    def order(self, labs: Iterable[str]) -> list[str]:
        """Put labs behind the others that failed, or in which calls were killed, more often."""
        return sorted(labs, key=lambda lab: self.labs.get(lab, Tried()).ended_early)

    def page(self) -> Path | None:
        """Write the page of the machine that ran; None where no lab was finished."""
        runs = [RunFolder((ROOT / run).resolve()) for run in self.done.values()]
        return leaderboards.write_machine(runs[0].path.parent.parent, runs) if runs else None

    def end(self, labs: Collection[str]) -> None:
        """Forget these labs, so that the next call starts over with them; keep the others."""
        self.labs = {lab: tried for lab, tried in self.labs.items() if lab not in labs}
        if self.labs:
            self.save()
        else:
            self.file.unlink(missing_ok=True)


def chosen(only: str, by_value: bool) -> list[str]:
    """Return the labs to run, in their order: those that `only` names, or every lab.

    `by_value` puts the labs with the most to show on a GPU first. Raises LabError.
    """
    if not only:
        first = [name for name in FIRST if name in LABS] if by_value else []
        return list(dict.fromkeys([*first, *LABS]))
    names = list(dict.fromkeys(name.strip() for name in only.split(",") if name.strip()))
    for name in names:
        if name not in LABS:
            known = ", ".join(LABS)
            raise LabError(f"ONLY: there is no lab {name!r}{did_you_mean(name, LABS)} are {known}")
    if not names:
        raise LabError("ONLY names no lab: separate names by commas")
    return names


def check_flags(names: Iterable[str], requests: Iterable[RunRequest], machine: Machine) -> None:
    """Have each engine's parser read the flags of all these labs at once, and remember them.

    A parser takes long to import. What goes wrong here, as with refused flags, is reported by the
    lab when its turn comes.
    """
    sets: dict[str, list[Flags]] = {}
    for name, request in itertools.product(names, requests):
        with contextlib.suppress(Exception):
            lab = LABS[name].at(
                scale_of(machine), request.quick, request.changes, bool(request.weights)
            )
            for variant in lab.variants:
                own = lab.flags_of(variant)
                known = sets.setdefault(variant.engine, [])
                known += [own, own.without_queue_limits()]  # where an older vLLM has none
    for engine, flags in sets.items():
        with contextlib.suppress(Exception):
            ENGINES[engine].check_flags(flags)


def start(
    quick: bool,
    model: str,
    fresh: bool,
    weights: str = "",
    changes: Mapping[str, Any] | None = None,
) -> Sitting:
    """Return the unfinished record of this machine with these settings, or a new one."""
    new = Sitting(
        machine=machines.detect().slug,
        quick=quick,
        model=model,
        weights=weights,
        changes=dict(changes or {}),
        vllm=Vllm.version(),
        results=str(RESULTS),
    )
    if fresh or not new.file.exists():
        return new
    try:
        unfinished = read_json(new.file, Sitting)
    except DamagedError:
        return new
    for tried in unfinished.labs.values():
        if not (ROOT / tried.run / "COMPLETE").exists():
            tried.run = ""
    return unfinished


@command("all", "labs-all", needs_vllm=True)
def run_all(
    quick: bool = False,
    set_: str = "",
    model: str = "",
    weights: str = "",
    tp: int = 1,
    fresh: bool = False,
    only: str = "",
    seconds: float | None = None,
    archive: Path | None = None,
    engine_command: str = "",
    price_per_hour: float = 0.0,
) -> None:
    """Run every lab in order, continuing where an earlier call stopped; write one page of all."""
    labs = chosen(only, by_value=seconds is not None)
    changes = changes_of(set_, tp)
    state = start(quick, model, fresh, weights, changes)
    clock = Clock.of(seconds, state.starts_s, state.preparations_s)
    request = RunRequest(
        next(iter(LABS.values())),
        quick=quick,
        changes=changes,
        model=model,
        weights=weights,
        engine_command=command_words(engine_command),
        clock=clock,
        usd_per_hour=price_of(price_per_hour),
    )
    if clock.bounded:
        console.print(
            f"This call may last {seconds:.0f} s, and an engine has"
            f" {clock.start_timeout_s:.0f} s to start"
        )
    try:
        outcome = _play_all(request, labs, state, archive)
    finally:
        _pack(archive)
    if not clock.bounded and (page := state.page()):
        console.print(f"\nEvery lab on one page: [bold]{shown_path(page)}[/]")
    for what, labs_why in (("Skipped", outcome.skipped), ("Not finished", outcome.not_finished)):
        for why, names in _by_reason(labs_why).items():
            console.print(f"{what}: {', '.join(names)}: {escape(why)}")
    if outcome.time_used_up:
        left = [name for name in labs if name not in {*state.done, *outcome.skipped}]
        console.print(f"To be done: {', '.join(left)}. The same call goes on with them.")
        raise typer.Exit(os.EX_TEMPFAIL)
    if outcome.not_finished:
        again = ", ".join(outcome.not_finished)
        console.print(f"Call `make labs-all` again: it runs only {again}.")
        raise typer.Exit(1)
    if clock.bounded:
        console.print("Everything is done: FRESH=1 starts over.")
    else:
        state.end(labs)


@dataclass
class _Outcome:
    """Holds what became of the labs that a call has tried."""

    skipped: dict[str, str] = field(default_factory=dict)
    not_finished: dict[str, str] = field(default_factory=dict)
    time_used_up: bool = False


def _play_all(
    request: RunRequest, names: Sequence[str], state: Sitting, archive_file: Path | None
) -> _Outcome:
    """Run the chosen labs that are not done, as far as the request's clock allows."""
    clock, outcome = request.clock, _Outcome()
    host = machines.detect()
    check_flags([name for name in names if name not in state.done], [request], host)
    for number, name in enumerate(state.order(names), 1):
        lab = LABS[name]
        console.print(f"\n[bold]Lab {number} of {len(names)}: {lab.title}[/]")
        if name in state.done:
            console.print(f"Done by an earlier call: {escape(state.done[name])}")
            continue
        try:
            clock.require(clock.preparation_s(host.kind) + clock.start_s(host.kind), lab.name)
            folder = _begin_or_continue(replace(request, lab=lab), state)
        except TimeUsedUp as reason:
            console.print(f"The time for this call is used up: {escape(str(reason))}")
            outcome.time_used_up = True
            break
        except NotApplicable as reason:
            outcome.skipped[name] = str(reason)
            console.print(f"Skipped: {escape(str(reason))}")
        except Exception as error:
            why = _what_stopped(error, name, host.slug)
            before = _by_reason(outcome.not_finished).get(why)
            outcome.not_finished[name] = why
            told = f"the same as in {before[0]}" if before else why
            errors.print(f"[bold red]error:[/] {escape(told)}")
            _pack_between(archive_file)
        else:
            if folder.complete:
                state.finish(name, folder.path)
            else:
                outcome.not_finished[name] = "some of its trials failed"
            _pack_between(archive_file)
        finally:  # what this call measured helps the next one to plan
            state.starts_s = list(clock.starts_s)
            state.preparations_s = list(clock.preparations_s)
            state.save()
    return outcome


def _by_reason(whys: Mapping[str, str]) -> dict[str, list[str]]:
    """Gather the labs that were not run for one reason, so that it is told once."""
    labs: dict[str, list[str]] = {}
    for lab, why in whys.items():
        labs.setdefault(why, []).append(lab)
    return labs


def _begin_or_continue(request: RunRequest, state: Sitting) -> RunFolder:
    """Run the request's lab, anew where its unfinished run cannot be continued.

    That the time of a call ends is not held against it, nor that it does not apply; in a call
    without a time limit, Ctrl-C is a person's own decision, and is not.
    """
    resume = state.begin(request.lab.name)
    excused = (TimeUsedUp, NotApplicable, *((KeyboardInterrupt,) * (not request.clock.bounded)))
    try:
        try:
            return play(replace(request, resume=resume), THE_SAME_CALL)
        except CannotResume as reason:
            console.print(f"{escape(str(reason))}. It is started anew.")
            return play(replace(request, resume=False), THE_SAME_CALL)
    except excused:
        state.excuse(request.lab.name)
        raise


def _what_stopped(error: Exception, lab: str, machine_slug: str) -> str:
    """Say in a sentence what ended a lab.

    What has no sentence for the reader is a fault of the lab or of the machine: its traceback is
    written beside the lab's results, without secrets, and the sentence names the file.
    """
    if isinstance(error, EXPECTED_ERRORS):
        return tellable(str(error))
    what = refusal_of(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
    log = RESULTS / machine_slug / lab / f"error-{moment()}.log"
    try:
        atomic.write(log, recordable(tellable("".join(traceback.format_exception(error)))))
    except OSError:  # as on a full disk, which may be what ended the lab
        return tellable(what)
    return f"{tellable(what)} (traceback: {os.path.relpath(log)})"


def _pack_between(file: Path | None) -> None:
    """Pack between two labs: an archive that cannot be written ends no outcome."""
    try:
        _pack(file)
    except OSError as error:
        errors.print(f"[bold red]error:[/] {escape(refusal_of(error))}")


def _pack(file: Path | None) -> None:
    """Write the archive of this machine's results anew, where one is asked for."""
    if file and (written := write_here(file)):
        size = sum(path.stat().st_size for path in written) / 1e6
        names = ", ".join(path.name for path in written)
        console.print(f"[dim]Packed into {escape(names)}: {size:.1f} MB[/]")
