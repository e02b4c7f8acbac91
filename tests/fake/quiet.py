"""The `labs` command on a machine that, as far as it can tell, does nothing else.

Other tests run meanwhile, and beside a fake engine, which uses hardly any CPU time, whatever they
use is much. What else disturbs a trial, such as a late load generator, is noticed as ever.
"""

from __future__ import annotations

from labs.commands.cli import app
from labs.running.machine_load import OtherLoad, Shares

__all__ = ["app"]


def _only_ours(self: OtherLoad) -> Shares:
    return Shares(steal=0.0, others=0.0, engine=measured(self).engine)


measured = OtherLoad.shares
OtherLoad.shares = _only_ours  # type: ignore[method-assign]

if __name__ == "__main__":
    app()
