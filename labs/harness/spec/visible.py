"""What every page, report, picture and terminal leaves out of a text.

A text may come from outside: a claim's title, a model's name, a setting, an endpoint's answer.
Control characters could move a terminal's cursor, hide lines or set the clipboard, and marks of
direction make a reader see another order than is written. Line breaks and tabs stay.
"""

from __future__ import annotations

from typing import Any

CONTROLS = {*range(0x20), *range(0x7F, 0xA0)} - set(map(ord, "\n\t"))  # Unicode's category Cc
DIRECTIONS = {0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)}
LEFT_OUT = dict.fromkeys(CONTROLS | DIRECTIONS)


def visible(text: str) -> str:
    """Return a text without what is left out everywhere.

    It comes before what escapes markup, which looks at the characters that are next to each other.
    """
    return text.translate(LEFT_OUT)


def visible_data(data: Any) -> Any:
    """Return what a page's scripts are given, with the same left out of all its texts."""
    match data:
        case str():
            return visible(data)
        case dict():
            return {visible_data(key): visible_data(value) for key, value in data.items()}
        case list() | tuple():
            return [visible_data(each) for each in data]
    return data
