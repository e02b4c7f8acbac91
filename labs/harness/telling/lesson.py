"""The lesson of a lab: what its module's docstring teaches, for the report."""

from __future__ import annotations

import importlib
import inspect

from labs.harness.page import folder_of, page_of

KNOBS = "Turn: "  # begins the paragraph on what to change, which a report has elsewhere


def lesson(lab: str) -> list[str]:
    """Return the paragraphs that explain the mechanism; none where the lab has no module here.

    The first line of the docstring is the lab's question, which stands above every report.
    """
    if page := page_of(lab):
        return page.how_it_works
    folder = folder_of(lab)
    if not (folder / "lab.py").exists():
        return []
    module = importlib.import_module(f"labs.{folder.name}.lab")
    _, *paragraphs = inspect.cleandoc(module.__doc__ or "").split("\n\n")
    return [" ".join(text.split()) for text in paragraphs if not text.startswith(KNOBS)]
