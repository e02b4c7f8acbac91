"""Starts the command line. While it is loaded, which takes seconds, Ctrl-C ends it in one line."""

from __future__ import annotations

import os
import signal
from types import FrameType


def _stop(signum: int, frame: FrameType | None) -> None:
    """End at once: nothing has begun, and an exception may be lost in the middle of an import."""
    os.write(1, b"Stopped.\n")
    os._exit(128 + signum)


def main() -> None:
    """Load the commands, and run the one that was typed."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, _stop)
    from serving.gpus import BY_BUS, ORDER
    from serving.models import CACHE

    os.environ.setdefault(ORDER, BY_BUS)
    # Matplotlib's list of fonts is kept here, whatever HOME is
    os.environ.setdefault("MPLCONFIGDIR", str(CACHE / "matplotlib"))
    from labs.harness.commands.cli import app

    app()


if __name__ == "__main__":
    main()
