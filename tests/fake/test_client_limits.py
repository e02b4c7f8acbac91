"""The load generator holds the limits on the queue of an engine that has none."""

from __future__ import annotations

from collections.abc import Sequence

from loadtests.records import BY_CLIENT, RequestRecord
from tests.fake.conftest import LABS_WITHOUT_PROMETHEUS, Reader
from tests.sizes import BRIEF, sizes_of

LIMIT = 6  # requests, by the lab's size on the fake engine
BY_TWO = (
    ' admission_by_client=true load_processes=2 variants=["unbounded","capped","capped-tokens"]'
)


def most_at_once(records: Sequence[RequestRecord]) -> int:
    ended = [(r.sent_s, r.over_s) for r in records if not r.turned_away]
    return max(sum(sent <= at < end for sent, end in ended) for at, _ in ended)


def test_the_client_turns_away_what_the_engine_cannot(reader: Reader) -> None:
    settings = f"{BRIEF} {sizes_of('overload').fake} {BY_TWO}"
    command = reader.types(
        "run", "overload", QUICK="1", SET=settings, program=LABS_WITHOUT_PROMETHEUS
    )
    assert command.wait() == 0, command.said
    assert len(reader.engine_starts()) == 3
    assert not any("queued" in argv for _, argv in reader.engine_starts())
    folder = command.folder
    run, summary = folder.run(), folder.summary()
    assert run.lab["admission_by_client"] is True
    assert not any("queued" in argument for argv in run.argv.values() for argument in argv)
    trials = {
        point.key: trial
        for point, _, trial in folder.trials(run.points(), run.rebuilt_lab())
        if trial
    }
    limited = [trial for key, trial in trials.items() if key.startswith("capped")]
    for trial in limited:
        assert all((r.error or "").startswith(BY_CLIENT) for r in trial.turned_away)
        if trial.point.variant.name == "capped":
            # two processes may decide at once, and each has a clock of its own
            assert most_at_once(trial.records) <= LIMIT + 1
    assert any(trial.turned_away for trial in limited)
    assert not trials["unbounded/mixed/capacity-2"].turned_away
    sent = [r for trial in trials.values() for r in trial.records if not r.turned_away]
    assert len(sent) == sum(line["stream"] for line in reader.engine_log())
    assert not [c.text for c in summary.caveats if c.name == "treatment not applied"]
    assert f"{LIMIT} requests (client's)" in (folder.path / "report.md").read_text()
