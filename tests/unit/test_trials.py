"""What makes a trial fail although the load was played to its end."""

from __future__ import annotations

from labs.running.trials import nothing_measured
from tests.unit.builders import make_record

ANSWERED = make_record([(11.0, 1), (12.0, 3)])
WARM_UP = make_record([(1.0, 1)], sent_s=0.5, in_window=False)
REFUSED = make_record([], error="HTTP 500: out of memory")


def test_a_trial_in_which_no_counted_request_succeeds_has_failed() -> None:
    assert nothing_measured([WARM_UP, REFUSED, REFUSED]) == (
        "no request in the window succeeded, of 2; the first failed with: HTTP 500: out of memory"
    )


def test_a_trial_without_a_request_in_its_window_has_failed() -> None:
    assert nothing_measured([WARM_UP]).startswith("nothing was sent in the window: lengthen it")
    assert nothing_measured([]).startswith("nothing was sent")


def test_one_counted_answer_is_a_measurement() -> None:
    assert nothing_measured([WARM_UP, REFUSED, ANSWERED]) == ""
