"""Makes what is derived from a model: `python -m serving.models MAKER BASE OUT`.

MAKER is a module of this folder. Its `make(base, out)` fills a folder, prints its progress and
returns the facts that are recorded beside what it made; some also take `--method`, and some
`--source`, the file that they read. OUT appears only when it is complete.
"""

from __future__ import annotations

import argparse
import importlib
import json
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from serving import atomic
from serving.models.catalog import RECORD
from serving.models.making import MakerError


def main(argv: Sequence[str] | None = None) -> None:
    """Make a folder: SIGTERM acts as Ctrl-C, and an error that can be mended is one sentence."""
    parser = argparse.ArgumentParser(prog="python -m serving.models", description=__doc__)
    parser.add_argument("maker")
    parser.add_argument("base", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--method")
    parser.add_argument("--source", type=Path)
    given = vars(parser.parse_args(argv))
    maker, base, out = (given.pop(name) for name in ("maker", "base", "out"))
    options = {name: value for name, value in given.items() if value is not None}
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if out.exists():
        sys.exit(f"{out} exists already: remove it, or name another folder")
    try:
        with atomic.folder(out) as half:
            began = time.monotonic()
            facts = importlib.import_module(f"serving.models.{maker}").make(base, half, **options)
            record = {"seconds": round(time.monotonic() - began, 1), **facts}
            (half / RECORD).write_text(json.dumps(record, indent=2) + "\n")
    except MakerError as error:
        sys.exit(str(error))
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # PyTorch's, which not every maker imports
            raise
        sys.exit(f"the GPU has too little memory to make {out.name}: {error}")
    except KeyboardInterrupt:
        sys.exit(f"stopped before {out} was complete: nothing was kept")


if __name__ == "__main__":
    main()
