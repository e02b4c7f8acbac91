"""The glossary names what is there."""

import importlib
import inspect
import re
from pathlib import Path

from tests.cases import each

GLOSSARY = Path(__file__).resolve().parents[2] / "docs" / "glossary.md"
ROWS = re.findall(r"^\| ([^|]+) \| [^|]+ \| `([\w.]+)` \|$", GLOSSARY.read_text(), re.MULTILINE)


def named(path: str) -> object:
    """The module, class, function or attribute of that dotted name."""
    parts = path.split(".")
    for size in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:size]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[size:]:
            found = inspect.getattr_static(found, attribute)
        return found
    raise ModuleNotFoundError(path)


@each(("word", "path"), ROWS)
def test_a_word_is_defined_where_the_glossary_says(word: str, path: str) -> None:
    assert named(path) is not None


def test_every_row_is_read() -> None:
    rows = [line for line in GLOSSARY.read_text().splitlines() if line.startswith("| ")]
    headers = sum(line.startswith("| Word |") for line in rows)
    assert len(ROWS) == len(rows) - 2 * headers > 20
