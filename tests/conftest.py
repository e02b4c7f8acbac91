"""No test sees what the reader set, for the labs, for pytest or for git, or in another make."""

from __future__ import annotations

import os

for name in tuple(os.environ):
    if name.startswith(("LABS_", "GIT_", "MAKE", "MFLAGS", "PYTEST_ADDOPTS")):
        del os.environ[name]
