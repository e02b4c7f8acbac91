"""What the Makefile and the pages for readers say, for the tests of both."""

from __future__ import annotations

from serving.weights.models import ROOT

MAKEFILE = (ROOT / "Makefile").read_text()
LINES = MAKEFILE.replace("\\\n", "").splitlines()
SETTINGS = next(line.split()[2:] for line in LINES if line.startswith("SETTINGS :="))
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
