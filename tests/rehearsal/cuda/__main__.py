"""Rehearses the CUDA build of vLLM: `make rehearse-cuda [MACHINE=h100|l4|..|all] [PYTHON=..]`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from serving.engines.vllm import PLUGINS
from serving.weights.models import ROOT
from tests.golden.plays import figures
from tests.rehearsal.cards import CARDS, VARIABLE
from tests.rehearsal.cuda import checks
from tests.rehearsal.cuda.checks import Check
from tests.rehearsal.cuda.environment import HOME, PYTHON

HERE = Path(__file__).parent
STAND_INS = (HERE / "stand_in", HERE.parent / "stand_in", ROOT, PLUGINS)
HOPPER = (9, 0)  # the compute capability that `serving/lean.py` leaves packages out for
GOLDEN = ROOT / "tests" / "golden"


@dataclass(frozen=True)
class Part:
    """What one process found, and how long it took."""

    card: str
    found: Sequence[Check]
    took_s: float


def as_on(card: str) -> dict[str, str]:
    """Return the environment in which every process has this GPU."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("LABS_")}
    return {
        **kept,
        VARIABLE: card,
        "PYTHONPATH": os.pathsep.join(map(str, STAND_INS)),
        "LD_LIBRARY_PATH": str(HOME),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }


def run_checks(card: str, module: str, scratch: Path) -> Part:
    """Run a module of checks in the environment; that it ends early is a failure of its own."""
    print(f"as on {card}: {module} ...", flush=True)
    began, file = time.monotonic(), scratch / f"{card}-{module}.jsonl"
    command = [str(PYTHON), "-m", f"tests.rehearsal.cuda.{module}", str(file), str(HOME / "models")]
    done = subprocess.run(command, env=as_on(card), cwd=ROOT, capture_output=True, text=True)
    found = checks.read(file) if file.exists() else []
    if done.returncode:
        ended = checks.last_line(done.stderr)
        found.append(Check(what=module, name="ended early", error=ended))
    return Part(card, found, time.monotonic() - began)


def play(card: str) -> Part:
    """Play the plan of tests/golden, and compare with what was recorded of this version."""
    print(f"as on {card}: plays ...", flush=True)
    began = time.monotonic()
    command = [str(PYTHON), "-m", "tests.golden"]
    done = subprocess.run(command, env=as_on(card), cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        error = checks.last_line(done.stderr)
        return Part(card, [Check(what="plays", name="all", error=error)], time.monotonic() - began)
    played = json.loads(json.dumps(figures(done.stdout.splitlines()[1:])))
    expected = json.loads((GOLDEN / f"vllm-{version()}.json").read_text())
    found = [
        Check(
            what="plays", name=key,
            error="" if played.get(key) == expected.get(key) else "not what was recorded",
        )
        for key in played | expected
    ]  # fmt: skip
    return Part(card, found, time.monotonic() - began)


def version() -> str:
    """Return the minor version of the vLLM in the environment."""
    code = "from importlib.metadata import version; print(version('vllm'))"
    done = subprocess.run([str(PYTHON), "-c", code], capture_output=True, text=True, check=True)
    return ".".join(done.stdout.strip().split(".")[:2])


def table(parts: Iterable[Part]) -> str:
    """Tell by GPU and kind of check how many passed and failed; the seconds are the process's."""
    lines = [f"{'on':<11}{'checked':<38}{'passed':>7}{'failed':>7}{'left out':>9}{'seconds':>9}"]
    for part in parts:
        seconds = f"{part.took_s:.0f}"
        for what in dict.fromkeys(check.what for check in part.found):
            of = [check for check in part.found if check.what == what]
            left_out = sum(not check.applies for check in of)
            failed = sum(bool(check.error) and check.applies for check in of)
            passed = len(of) - failed - left_out
            lines.append(
                f"{part.card:<11}{what:<38}{passed:>7}{failed:>7}{left_out:>9}{seconds:>9}"
            )
            seconds = ""
    return "\n".join(lines)


def told(parts: Sequence[Part], about: Callable[[Check], str]) -> str:
    """List the checks about which there is something to say, with the kinds and cards of each."""
    where: dict[str, tuple[list[str], list[str]]] = {}
    for part in parts:
        for check in part.found:
            if says := about(check):
                kinds, cards = where.setdefault(f"  {check.name}: {says}", ([], []))
                kinds.append(check.what)
                cards.append(part.card)
    return "\n".join(
        f"{line} ({'; '.join(dict.fromkeys(kinds))}; on {', '.join(dict.fromkeys(cards))})"
        for line, (kinds, cards) in where.items()
    )


def computed_by(parts: Iterable[Part]) -> str:
    """Tell by kind of model what vLLM chose for its layers, and on which cards."""
    where: dict[str, list[str]] = {}
    for part in parts:
        for check in part.found:
            if check.built:
                where.setdefault(f"  {check.what}: {check.built}", []).append(part.card)
    return "\n".join(f"{line} (on {', '.join(dict.fromkeys(on))})" for line, on in where.items())


def for_lean(cards: Iterable[str]) -> list[str]:
    """Return the first of the cards that a lean bundle is for; none where it is for none."""
    return [card for card in cards if CARDS[card].capability == HOPPER][:1]


def make_environment() -> int:
    """Have the Python that PYTHON= names make the environment; return the exit code."""
    wanted = os.environ.get("LABS_PYTHON") or sys.executable
    python = shutil.which(os.path.expanduser(wanted))
    if not python:
        print(f"there is no {wanted}: name a Python with PYTHON=", file=sys.stderr)
        return 1
    command = [python, "-m", "tests.rehearsal.cuda.environment"]
    return subprocess.run(command, cwd=ROOT).returncode


def main() -> int:
    wanted = os.environ.get("LABS_MACHINE") or "h100"
    cards = [*CARDS] if wanted == "all" else [wanted]
    if not set(cards) <= CARDS.keys():
        print(f"MACHINE={wanted} is not known here: give {', '.join(CARDS)} or all")
        return 1
    if make_environment():
        return 1
    with tempfile.TemporaryDirectory(prefix="rehearsal-cuda-") as folder:
        parts = [
            run_checks(cards[0], "names", Path(folder)),
            play(cards[0]),
            *(run_checks(card, "lean", Path(folder)) for card in for_lean(cards)),
            *(
                run_checks(card, module, Path(folder))
                for card in cards
                for module in ("configure", "build")
            ),
        ]
    failed = told(parts, lambda check: check.error if check.applies else "")
    for title, lines in (
        ("Left out", told(parts, lambda check: "" if check.applies else check.error)),
        ("To be known", told(parts, lambda check: check.note)),
        ("Computed by", computed_by(parts)),
        ("Failed", failed or "  nothing"),
    ):
        if lines:
            print(f"\n{title}:\n{lines}")
    print(f"\n{table(parts)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
