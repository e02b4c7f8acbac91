"""Commands that play again what was measured elsewhere: a run, a benchmark, a published claim."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import typer
from rich.markup import escape

from labs.harness.cli.options import (
    changes_of,
    command_words,
    price_of,
    recorded_machine,
    require_known,
)
from labs.harness.cli.options import command as registered
from labs.harness.cli.planning import forecast_page
from labs.harness.cli.recorded_runs import scored
from labs.harness.cli.run_lab import play
from labs.harness.cli.terminal import ConsoleProgress, console, say, show, shown_path
from labs.harness.comparison import reproduction
from labs.harness.comparison.sides import read_side
from labs.harness.plan import benchmarks
from labs.harness.plan.command_lines import note
from labs.harness.plan.resolve import RunRequest, lab_of, machine_of, scale_of
from labs.harness.reports.document import bullets, section, table_of
from labs.harness.runner import reproduce
from labs.harness.spec.lab import LabError
from labs.harness.storage import manifest
from labs.harness.storage.results import open_run
from serving.engines.vllm import Vllm
from serving.hardware import machine as machines
from serving.hardware.gpus import DATASHEETS
from serving.models.dummy import SHAPES


@registered("reproduce", needs_vllm=True)
def reproduce_run(
    run: Path | None = None,
    command: str = "",
    serve: str = "",
    theirs: Path | None = None,
    published: str | None = None,
    machine: str = "",
    model: str = "",
    weights: str = "",
    set_: str = "",
    resume: bool = False,
    engine_command: str = "",
    price_per_hour: float = 0.0,
) -> None:
    """Play again what was measured elsewhere: a recorded run, a benchmark, a published claim.

    `RUN=` repeats a run and says which of its figures came out the same. Exit code 0: every verdict
    was reproduced; 1: one was not, or the repetition failed; 2: the repeats do not decide it.

    `COMMAND=` plays the load of another tool's command here, with the flags of `SERVE=`, and tells
    it by that tool's definitions, beside the figures in `THEIRS=`. `PUBLISHED=` does so for a
    figure that others published. What is pasted is parsed, never executed. Exit code 2: such a load
    cannot be played here, or its GPU is not here and it was forecast instead.
    """
    given = {"RUN": run, "COMMAND": command, "PUBLISHED": published is not None}
    if sum(map(bool, given.values())) != 1:
        raise LabError(f"give one of {', '.join(f'{name}=' for name in given)}: what to play again")
    words, usd_per_hour = command_words(engine_command), price_of(price_per_hour)
    if run:
        others = {"SERVE": serve, "THEIRS": theirs, "MACHINE": machine, "WEIGHTS": weights}
        for name in (name for name, value in {**others, "SET": set_}.items() if value):
            raise LabError(f"{name}= changes nothing of a recorded run: leave it out beside RUN=")
        _repeat(run, model, resume, words, usd_per_hour)
        return
    claim = None
    if published is not None:
        claim = _claim(published)
        command, serve = claim.command, claim.serve
    translated = benchmarks.translate(command, serve, model)
    card = machine or (claim.card if claim and not _is_here(claim.card) else "")
    request = RunRequest(
        translated.lab, changes=changes_of(set_), translated=translated.recorded, weights=weights,
        resume=resume, engine_command=words, usd_per_hour=usd_per_hour,
        unsafe_flags=claim is not None,  # the lab's own list may name a draft model
    )  # fmt: skip
    if card:
        shape = claim.shape if claim and not model else model or _shape(translated.model)
        (variant,) = translated.lab.variants
        variant = variant.but(variant.name, weights=claim.weights if claim else "")
        lab = translated.lab.model_copy(update={"variants": (variant,)})
        request = _elsewhere(replace(request, lab=lab, model=shape), card)
    else:
        request = replace(request, model=model or reproduce.harmless_model(translated.model))
    figures = benchmarks.theirs(theirs, translated) if theirs else []
    _say_what_differs(translated, request)
    if card:
        with ConsoleProgress() as progress:
            progress.show(forecast_page(request, None, progress))
        if not machine:
            say(note("needs_card", card=card))
            raise typer.Exit(2)
        return
    folder = play(request)
    if not folder.complete:
        raise LabError("some trials failed: RESUME=1 plays them again")
    show(scored(folder, translated.tool, figures))


def _claim(name: str) -> benchmarks.PublishedClaim:
    claims = benchmarks.published_claims()
    require_known("PUBLISHED", name, tuple(claims))
    claim = claims[name]
    say(f"Published: {claim.figure} ({claim.source})")
    show(bullets(note("not_given", what=sentence) for sentence in claim.not_given))
    return claim


def _is_here(card: str) -> bool:
    host = machines.detect()
    return host.model in DATASHEETS and DATASHEETS[host.model].short_name == card


def _shape(model: str) -> str:
    """Find the shape that ships with the lab of a model, by its id. Raises LabError."""
    parts = model.lower().rpartition("/")[2].split("-")
    for shape in SHAPES:
        if {*shape.split("-")} <= {*parts}:
            return shape
    raise LabError(f"of {model or 'no model'} no shape ships with the lab: name one with MODEL=")


def _elsewhere(request: RunRequest, card: str) -> RunRequest:
    """Ask for a forecast on a machine that is not here. Raises LabError."""
    on_file = recorded_machine(card, "")
    if on_file:
        return replace(
            request, card=card, on_file=on_file, model=on_file.model, weights=on_file.weights
        )
    machine_of(card)  # refused before anything is said
    return replace(request, card=card, weights="dummy")


def _say_what_differs(translated: benchmarks.Translated, request: RunRequest) -> None:
    """Say what is not translated, or otherwise, before anything starts."""
    host = request.on_file.machine if request.on_file else machine_of(request.card)[0]
    lab = lab_of(request, scale_of(request, host))
    (variant,) = lab.variants
    flags = [f"{name}={lab.flags[name]}" for name in lab.flags if name not in variant.flags]
    stand_in = [note("stands_in", flags=", ".join(flags))] if flags else []
    show(section("What is not as in the command", bullets([*translated.notes, *stand_in])))


def _repeat(
    run: Path, model: str, resume: bool, words: Sequence[str], usd_per_hour: float | None
) -> None:
    """Repeat a recorded run, and end with what came of its verdicts."""
    original = read_side(str(open_run(run).path)).folder
    original_run = original.run()
    request = reproduce.request(original_run, model, resume, words)
    for sentence in reproduce.notes(original_run, Vllm.version()):
        console.print(f"[bold yellow]{escape(sentence)}[/]")
    differ = manifest.table(reproduce.differs_here(original_run, request), ("there", "here"))
    if len(differ) > 1:
        show(section("What differs here", table_of(differ)))
    folder = play(replace(request, usd_per_hour=usd_per_hour))
    if not folder.complete:
        raise LabError("some trials of the reproduction failed: RESUME=1 plays them again")
    result = reproduction.compare_with_original(original, folder)
    show(section("Reproduced?", reproduction.told(result)))
    page = folder.path / "reproduction.md"
    console.print(f"Every figure: [bold]{shown_path(page)}[/]", soft_wrap=True)
    filed = shown_path(reproduction.file_with_original(result, original))
    console.print(f"Filed with the original run: [bold]{filed}[/]", soft_wrap=True)
    raise typer.Exit(result.exit_code)
