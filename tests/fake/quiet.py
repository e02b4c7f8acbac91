"""The `labs` command on a machine that, as far as it can tell, does nothing else.

Other tests run meanwhile, and beside a fake engine, which uses hardly any CPU time, whatever they
use is much. What else disturbs a trial, such as a late load generator, is noticed as ever. A fake
engine has done all when it has answered, and needs no rest before it is suspended.
"""

from __future__ import annotations

from labs.harness.cli import cli
from labs.harness.runner import trials
from labs.harness.runner.machine_load import OtherLoad, Shares

measured = OtherLoad.shares


def _only_ours(self: OtherLoad) -> Shares:
    return Shares(steal=0.0, other_processes=0.0, engine=measured(self).engine)


def app() -> None:
    """Run the command line, in a process of its own: tests import this module, too."""
    OtherLoad.shares = _only_ours  # type: ignore[method-assign]
    trials.REST_S = 0.0
    cli.app()


if __name__ == "__main__":
    app()
