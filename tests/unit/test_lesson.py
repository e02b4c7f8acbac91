"""Each report teaches what its lab's docstring teaches."""

from __future__ import annotations

import pytest

from labs import LABS
from labs.harness.page import lesson
from labs.harness.telling.document import parse, plain_text


@pytest.mark.parametrize("lab", LABS)
def test_every_lab_has_a_lesson_of_whole_sentences(lab: str) -> None:
    paragraphs = [plain_text(parse(text)) for text in lesson(lab)]
    assert paragraphs
    for text in paragraphs:
        assert text.endswith(".")
        assert not text.startswith("Turn:")


def test_a_lab_that_is_not_here_has_none() -> None:
    assert lesson("no-such-lab") == []
