"""Says that what a reader asked for is not possible, and what is."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LabError(Exception):
    """The reader asked for something that is not possible; the message says what is."""

    exit_code = 1  # of the command that ends with it


class NotApplicable(LabError):
    """The lab's question has no meaning with random weights, or on this kind of machine."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Suggest the known name closest to a misspelled one.

    Returns the middle of a sentence that goes on with the known names.
    """
    matches = difflib.get_close_matches(name, list(known), 1)
    return f": did you mean {matches[0]}? Known" if matches else "; known"
