"""Many cases of a check as one test: each is checked, and the one that fails is named."""

from __future__ import annotations

import pytest

from tests.cases import each

SUMS = [(1, 2, 3), (2, 2, 4), (0, 1, 1)]


@each("sign", (1, -1))
@each(("one", "other", "total"), SUMS)
@pytest.mark.parametrize("times", [1, 2])
def test_what_is_left_out_of_the_cases_is_given_as_to_any_test(
    sign: int, one: int, other: int, total: int, times: int
) -> None:
    assert sign * times * one + sign * times * other == sign * times * total


def test_every_case_is_checked_up_to_the_first_that_fails_and_that_is_named() -> None:
    checked: list[int] = []

    @each("sign", (1, -1))
    @each("size", (1, 2, 3))
    def check(size: int, sign: int) -> None:
        checked.append(sign * size)
        assert sign * size != -2

    with pytest.raises(AssertionError) as failed:
        check()
    assert checked == [1, 2, 3, -1, -2]
    assert failed.value.__notes__ == ["where size = 2", "where sign = -1"]
