"""What the Makefile and the pages for readers say, for the tests of both."""

from __future__ import annotations

from labs.harness.cli import settings
from serving.models.catalog import ROOT

MAKEFILE = (ROOT / "Makefile").read_text()
LINES = MAKEFILE.replace("\\\n", "").splitlines()
SETTINGS = settings.names()
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
NOTEBOOK = tuple(sorted((ROOT / "docs" / "notebook").glob("*.md")))
