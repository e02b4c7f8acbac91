"""Runs programs that import Locust, which patches the process that it is in."""

from __future__ import annotations

import json
import subprocess
import sys

from serving.models.catalog import ROOT

_EACH = """
import contextlib, io, json, sys, traceback
said = []
for program, *sys.argv[1:] in json.load(sys.stdin):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            exec(program, {"__name__": "__main__"})
        except Exception:
            traceback.print_exc(file=out)
    said.append(out.getvalue())
json.dump(said, sys.stdout)
"""


def said_by(*programs: tuple[str, ...]) -> list[str]:
    """Run programs, each with its arguments, one after another, and return what each has said.

    One process runs all of them, as it takes most of its time to import Locust; so what one leaves
    patched, the next ones have. Of one that fails the traceback comes last.
    """
    argv, text = [sys.executable, "-c", _EACH], json.dumps(programs)
    done = subprocess.run(argv, cwd=ROOT, input=text, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said: list[str] = json.loads(done.stdout)
    return said
