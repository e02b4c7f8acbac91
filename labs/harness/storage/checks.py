"""Checks a run on file: whether it can be read, agrees with itself, and is fit to be published."""

from __future__ import annotations

import contextlib
import re
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from labs.harness.spec.lab import digest_of
from labs.harness.spec.names import TrialName
from labs.harness.storage import bounded
from labs.harness.storage.bounded import DamagedError
from labs.harness.storage.committed import tracked_names
from labs.harness.storage.results import UNREADABLE, RunFolder, first_line, readable
from serving.processes import masking

MOST_BYTES = 10 * 2**20  # of a run, since a collection is cloned as a whole
SECRET = re.compile(masking.PATTERN.encode())
SECRET_MARKS = tuple(mark.encode() for mark in masking.MARKS)
HOME = re.compile(rb"(?<![\w.~])/(?:home/[^/\s\"']+|Users/[^/\s\"']+|root)/")
HOME_MARKS = (b"/home/", b"/Users/", b"/root/")


def read_trials(folder: RunFolder) -> None:
    """Read every trial of a run, and keep none."""
    run = folder.run()
    deque(folder.trials(run.points(), run.rebuilt_lab()), maxlen=0)


def contradictions(
    folder: RunFolder, read: Callable[[RunFolder], object] = read_trials
) -> list[str]:
    """List where a run's files cannot be read or contradict each other; empty where they agree.

    What is missing of a run that was not finished is no contradiction. Where all else agrees, its
    trials are read by `read`, so that a caller who computes from them reads them once.
    """
    messages = []
    try:
        run = folder.run()
        lab, points = run.rebuilt_lab(), run.points()
        folder.predictions(), folder.summary()
        if run.digest != digest_of(run.lab):
            messages.append("its lab was changed after the run: the digest is another")
        if folder.complete:
            for point in points:
                for repeat in range(1, lab.repeats_of(point) + 1):
                    result, trial = folder.trial_result(point, repeat), TrialName(point.key, repeat)
                    if result is None:
                        messages.append(f"trial {trial} is missing")
                    elif result.failed:
                        messages.append(f"trial {trial} failed, and yet it is COMPLETE")
        (read_trials if messages else read)(folder)
    except UNREADABLE as error:
        messages.append(f"it cannot be read: {first_line(error)}")
    return messages


def unreadable(folder: RunFolder) -> str:
    """Say why the files that tables and pages rest on cannot be read; empty where they can."""
    try:
        with readable(folder):
            folder.run().points()
            if folder.complete:
                folder.predictions(), folder.summary()
    except (DamagedError, OSError) as error:
        return first_line(error)
    return ""


def problems(folder: RunFolder, read: Callable[[RunFolder], object] = read_trials) -> list[str]:
    """List what is wrong with a run on file; the list is empty when it is well formed.

    Its trials are read as `contradictions` says.
    """
    messages = contradictions(folder, read)
    with contextlib.suppress(DamagedError):  # it is listed already
        run = folder.run()
        if run.digest not in folder.path.name:
            messages.append("its folder does not carry its digest")
        if run.machine.slug != folder.machine_slug:
            messages.append("its folder is under another machine's name")
    if not folder.complete:
        messages.append("it has no COMPLETE")
    return [*messages, *_unfit_to_publish(folder.path)]


def _unfit_to_publish(run: Path) -> list[str]:
    """List secrets, names of home folders, logs that git tracks, and an excessive size."""
    unfit = []
    files = [p for p in sorted(run.rglob("*")) if p.is_file() and not p.is_symlink()]
    size = sum(p.stat().st_size for p in files if p.suffix != ".log")
    if size > MOST_BYTES:
        unfit.append(f"it has {size / 2**20:.1f} MiB, a run may have {MOST_BYTES / 2**20:.0f}")
    for path in files:
        if path.stat().st_size > MOST_BYTES:
            unfit.append(f"{path.relative_to(run)} is too large to be searched for secrets")
            continue
        try:
            packed = path.suffix in (".gz", ".xz")
            content = bounded.unpacked(path) if packed else path.read_bytes()
        except (OSError, DamagedError):
            continue  # a damaged file is reported where it is read
        name = path.relative_to(run)
        if _found(SECRET, SECRET_MARKS, content):  # the message must not repeat it
            unfit.append(f"{name} holds what looks like a secret: revoke it, then remove it")
        if path.suffix != ".log" and (home := _found(HOME, HOME_MARKS, content)):
            unfit.append(f"{name} names a home folder, {home[0].decode(errors='replace')}..")
    logs = tracked_names(run, "*.log")
    return [*unfit, *(f"{name} is a log that git keeps: remove it" for name in logs)]


def _found(
    pattern: re.Pattern[bytes], marks: Sequence[bytes], content: bytes
) -> re.Match[bytes] | None:
    """Search for a pattern whose matches all hold one of the marks, which are faster to find."""
    return pattern.search(content) if any(mark in content for mark in marks) else None
