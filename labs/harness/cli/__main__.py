"""Starts the command line. While it is loaded, which takes seconds, Ctrl-C ends it in one line."""

from __future__ import annotations

import argparse
import gc
import os
import signal
import sys
from types import FrameType

from serving import places

CLOSED = (
    "error: standard output or standard error is closed: to hide what is printed, send it to"
    f" {os.devnull}"
)


def _stop(signum: int, frame: FrameType | None) -> None:
    """End at once: nothing has begun, and an exception may be lost in the middle of an import."""
    os.write(1, b"Stopped.\n")
    os._exit(128 + signum)


def _require_open_streams() -> None:
    """End where standard output or errors are closed: the next file that is opened would be it."""
    if None in (sys.stdout, sys.stderr):
        print(CLOSED, file=sys.stderr or sys.stdout)
        sys.exit(1)


def _name_places() -> None:
    """Give modules and child processes the reader's folders, before any module takes its own."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--home")
    parser.add_argument("--results")
    named, rest = parser.parse_known_args(sys.argv[1:])
    if named.home:
        os.environ[places.VARIABLE] = os.path.abspath(named.home)
    if named.results:
        os.environ["LABS_RESULTS"] = os.path.abspath(named.results)
    sys.argv[1:] = rest


def main() -> None:
    """Load the commands, and run the one that was typed."""
    _require_open_streams()
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, _stop)
    _name_places()
    gc.set_threshold(100_000)  # most objects are modules', which stay: fewer searches for garbage
    from serving.hardware.gpus import BY_BUS, ORDER
    from serving.models.catalog import CACHE

    os.environ.setdefault(ORDER, BY_BUS)
    # Matplotlib's list of fonts is kept here, whatever HOME is
    os.environ.setdefault("MPLCONFIGDIR", str(CACHE / "matplotlib"))
    from labs.harness.cli.cli import app
    from labs.harness.cli.options import USAGE_ERROR, as_typed
    from labs.harness.cli.terminal import refusal_of

    try:
        sys.exit(app(standalone_mode=False))
    except USAGE_ERROR as error:
        print(f"error: {as_typed(error)}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # of a help, or a list, that cannot be printed
        sys.exit(f"error: {refusal_of(error)}")


if __name__ == "__main__":
    main()
