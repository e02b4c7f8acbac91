"""Engines that serve together, held against schedules that can be worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from serving.simulator.fleet import ROUTERS, Fleet, Handover, PrefixAware, Scaled, Scaling, Split
from serving.simulator.protocol import SyntheticRequest
from serving.simulator.traffic import Play, Prompt, Traffic, play
from tests.unit.test_forecasting import NONE, Server


def prompt(index: int, output_tokens: int, document: int = 0) -> Prompt:
    return SyntheticRequest(
        index=index, prompt_tokens=100, output_tokens=output_tokens, document=document,
        document_tokens=80 if document else 0,
    ).prompt  # fmt: skip


def played(fleet: Fleet | Split, at_s: list[float], prompts: list[Prompt]) -> Play:
    traffic = Traffic(kind="open", schedule_s=tuple(at_s), warmup_s=0, window_s=100)
    return play(fleet, traffic, prompts, (), NONE, ends_only=True)


def test_replicas_step_side_by_side_and_an_idle_one_begins_when_a_request_comes() -> None:
    slow, fast = Server(10), Server(1)
    answers = played(
        Fleet([slow, fast], ROUTERS["round-robin"]()), [0, 2.5], [prompt(0, 2), prompt(1, 3)]
    ).answers
    assert [(a.sent_s, a.chunks) for a in answers] == [
        (0, [(10, 1), (20, 1)]),
        (2.5, [(3.5, 1), (5.5, 2)]),  # it did not wait for the other's step to end
    ]


def test_a_request_that_comes_within_a_step_is_taken_up_in_the_next() -> None:
    fleet = Fleet([Server(1)], ROUTERS["round-robin"]())
    first, second = played(fleet, [0, 0.5], [prompt(0, 3), prompt(1, 1)]).answers
    assert first.chunks == [(1, 1), (3, 2)]
    assert second.chunks == [(2, 1)]


@pytest.mark.parametrize(("router", "served"), [("least-loaded", [1, 3]), ("round-robin", [2, 2])])
def test_a_busy_replica_is_spared_by_load_and_not_by_turns(router: str, served: list[int]) -> None:
    replicas = [Server(), Server()]
    asked = [prompt(0, 9), prompt(1, 1), prompt(2, 1), prompt(3, 1)]
    played(Fleet(replicas, ROUTERS[router]()), [0, 0, 1.5, 1.6], asked)
    assert [len(replica.served) for replica in replicas] == served


def test_prompts_of_a_document_stay_together_while_the_load_is_even() -> None:
    router = PrefixAware()
    first = router.choose(prompt(0, 1, document=1), [0, 0, 0])
    other = router.choose(prompt(1, 1, document=2), [1, 0, 0])
    assert first != other
    again = [router.choose(prompt(i, 1, document=1), [30, 3, 3]) for i in range(2, 6)]
    assert set(again) == {first}
    overloaded = [0, 0, 0]
    overloaded[first] = 2 * router.imbalance_requests
    moved = router.choose(prompt(7, 1, document=1), overloaded)
    assert moved != first
    assert router.choose(prompt(8, 1, document=1), [0, 0, 0]) == moved  # and stays there


HANDOVER = Handover(bytes_per_token=2, link_bytes_per_s=100, asked_s=0.5)  # 2 s for 100 tokens


def test_what_one_engine_has_prefilled_the_other_decodes_once_it_has_come_over() -> None:
    prefilling, decoding = Server(10), Server(1)
    asked = [prompt(0, 3), prompt(1, 2)]
    first, second = played(Split(prefilling, decoding, HANDOVER), [0, 0], asked).answers
    assert first.chunks == [(13.5, 1), (15.5, 2)]  # 10 + 0.5 + 2 on the link, then its steps
    assert second.chunks == [(15.5, 1), (16.5, 1)]  # the link is free at 12.5
    assert len(prefilling.served) == len(decoding.served) == 2


def test_streams_decode_on_while_the_other_engine_prefills() -> None:
    split = Split(Server(4), Server(1), HANDOVER)
    stream, late = played(split, [0, 4.1], [prompt(0, 9), prompt(1, 1)]).answers
    assert stream.chunks == [(7.5, 1), (15.5, 8)]
    assert late.chunks == [(12.5, 1)]  # prefilled at 8.1, over at 10.6: it waits for a step's end


def test_an_engine_that_decodes_may_not_turn_away_what_is_prefilled() -> None:
    class Full(Server):
        def add(self, request_id: str, prompt: Prompt) -> bool:
            return False

    with pytest.raises(ValueError, match="prefilled"):
        played(Split(Server(), Full(), HANDOVER), [0], [prompt(0, 1)])
    turned_away, *_ = played(Split(Full(), Server(), HANDOVER), [0], [prompt(0, 1)]).answers
    assert turned_away.turned_away_s == 0


@pytest.mark.parametrize("document_tokens", [0, 16, 99])
def test_synthetic_prompts_agree_in_their_document_and_nowhere_else(document_tokens: int) -> None:
    def tokens(index: int, document: int) -> tuple[int, ...]:
        return SyntheticRequest(
            index=index, prompt_tokens=100, output_tokens=1, document=document,
            document_tokens=document_tokens,
        ).prompt.token_ids  # fmt: skip

    def agreeing(one: tuple[int, ...], other: tuple[int, ...]) -> int:
        return next((i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), 100)

    assert len(tokens(3, 5)) == 100
    assert agreeing(tokens(3, 5), tokens(4, 5)) == document_tokens
    assert agreeing(tokens(3, 5), tokens(4, 6)) == 0
    assert agreeing(tokens(3, 5), tokens(3, 5)) == 100


class Gauged(Server):
    """A server whose KV cache is full with a request in it."""

    @property
    def kv_share(self) -> float:
        return float(self.busy)


def scaled(at_s: list[float], replicas: list[Gauged], **scaling: Any) -> Scaled:
    """Play requests of thirty tokens, a second each, on replicas whose number follows them."""
    fleet = Scaled(replicas, ROUTERS["least-loaded"](), Scaling(**scaling))
    answers = played(fleet, at_s, [prompt(i, 30) for i in range(len(at_s))]).answers
    assert all(sum(tokens for _, tokens in a.chunks) == 30 for a in answers)  # also who leaves
    return fleet


@pytest.mark.parametrize(
    ("rule", "threshold", "served"),
    [("queue", 1, [3, 1]), ("kv", 0.8, [2, 2]), ("kv", 1.1, [4, 0])],
)
def test_a_replica_is_ordered_by_its_signal_and_serves_a_start_later(
    rule: str, threshold: float, served: list[int]
) -> None:
    """One waits from 1.5 s on, so that one is ordered at 2 s; a cache is full at 1 s already."""
    replicas = [Gauged(), Gauged()]
    at_s = [0.5, 1.5, 4.5, 5.5]
    fleet = scaled(at_s, replicas, rule=rule, start_s=3, threshold=threshold)
    assert [len(replica.served) for replica in replicas] == served
    assert 1 <= fleet.mean_replicas <= 2
    assert (fleet.mean_replicas > 1) == (served[1] > 0)  # who starts is paid for


def test_by_a_plan_a_replica_is_ordered_a_start_ahead_and_leaves_in_time() -> None:
    replicas = [Gauged(), Gauged()]
    at_s = [0.5, 9.5, 10.5, 15.5, 16.5]
    scaled(at_s, replicas, rule="plan", start_s=3, plan=((0, 1), (10, 2), (15, 1)))
    # the second serves from 10 s on; from 15 s on it answers what it has, and gets no more
    assert [len(replica.served) for replica in replicas] == [4, 1]


def test_a_replica_leaves_once_the_others_had_room_for_long_enough() -> None:
    replicas = [Gauged(), Gauged()]
    at_s = [0.5, 0.6, 50.5, 51.5]
    scaled(at_s, replicas, rule="queue", start_s=1, threshold=1, calm_s=5)
    assert [len(replica.served) for replica in replicas] == [4, 0]
