"""Many cases of a fast check as one test."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

Test = Callable[..., None]


def each(names: str | tuple[str, ...], cases: Iterable[Any]) -> Callable[[Test], Test]:
    """Check every case in one test, where `pytest.mark.parametrize` makes a test of each.

    A test takes pytest some milliseconds, which is longer than a check of numbers or of text. The
    first case that fails ends the test, and is named with the failure.
    """
    checked = [*cases]
    assert checked, "a check of no case cannot fail"

    def named(case: Any) -> dict[str, Any]:
        return {names: case} if isinstance(names, str) else dict(zip(names, case, strict=True))

    def of(check: Test) -> Test:
        def test(*given: Any, **fixtures: Any) -> None:
            for case in map(named, checked):
                try:
                    check(*given, **fixtures, **case)
                except BaseException as failure:  # pytest's own are no `Exception`
                    told = (f"{name} = {value!s:.200}" for name, value in case.items())
                    failure.add_note(f"where {', '.join(told)}")
                    raise

        functools.update_wrapper(test, check)
        signature = inspect.signature(check)
        given_here = {names} if isinstance(names, str) else {*names}
        left = [p for name, p in signature.parameters.items() if name not in given_here]
        setattr(test, "__signature__", signature.replace(parameters=left))  # noqa: B010
        return test

    return of
