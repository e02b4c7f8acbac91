"""What the lab predicts of sessions, by hand and by a cache; and what it tells of them."""

from __future__ import annotations

import heapq
from collections import OrderedDict
from itertools import count
from pathlib import Path

import pytest

from labs import LABS
from labs.agent_sessions import facts, lab
from labs.harness.spec.lab import Point
from loadtests.arrivals import OfSessions
from tests.unit.builders import CEILINGS, SHAPE, make_record
from tests.unit.judged import context, judged_run, played

LAB = LABS["agent-sessions"].at("cpu", False)
POINTS = {p.key: p for p in LAB.points(SHAPE, CEILINGS)}
FEW, MANY, SLOW = "sessions-2-2", "sessions-5-2", "sessions-5-4"


def point(variant: str, load: str = MANY, workload: str = "agents") -> Point:
    return POINTS[f"{variant}/{workload}/{load}"]


def test_a_turn_is_found_while_a_turn_of_every_other_session_fits_beside_it() -> None:
    small, large = point("small"), point("large")
    # 128, 192, 256 and 320 tokens and answers of 4, in blocks of 32
    assert lab.turn_blocks(small) == (5 + 7 + 9 + 11) / 4
    assert lab.others_blocks(small) == [4 * 8]  # a turn of each
    assert (lab.room_blocks(small), lab.room_blocks(large)) == (23, 127)
    assert lab.sessions_held(small) == pytest.approx(23 / 8)
    # of four turns, three find the whole blocks of the prompt before them
    assert lab.found_tokens(large) == (4 + 6 + 8) * 32 / 4
    assert lab.found_tokens(small) == 0
    assert lab.found_tokens(point("small", FEW)) == lab.found_tokens(large)
    assert lab.hit_rate(large).value == pytest.approx(144 / 224)


def test_of_a_turn_that_fits_in_part_the_beginning_is_found() -> None:
    turned = LABS["agent-sessions"].at(
        "cpu", False, {"variants.small.flags.num-gpu-blocks-override": 38}
    )
    tight = next(p for p in turned.points(SHAPE, CEILINGS) if p.key == point("small").key)
    assert lab.found_tokens(tight) == (4 + 5 + 5) * 32 / 4  # 37 blocks, 32 of them the others'


def test_the_gap_alone_changes_nothing() -> None:
    assert lab.hits_ratio(point("large", SLOW), point("large")).value == 1
    assert lab.ttft_ratio(point("large"), point("small")).value < 0.7
    assert lab.ttft_ratio(point("small"), point("small", FEW)).value > 1.5


def test_only_whole_blocks_are_found_and_those_of_another_salt_never() -> None:
    plain, tenants = point("large"), point("large", workload="tenants")
    assert lab.hits_ratio(tenants, plain).value == 1
    coarse = point("coarse", workload="tenants")
    assert (coarse.kv_room_tokens, lab.turn_blocks(coarse)) == (plain.kv_room_tokens, 1.5)
    assert lab.found_tokens(coarse) == 256 / 4  # of the last turn's prompt alone
    assert lab.found_tokens(point("large", workload="strangers")) == 0


def found_by_a_cache(of: Point) -> float:
    """The share of prompt tokens found by a cache that forgets the least recently used block.

    Answers take no time, and each session begins at another turn of its conversation; of a request
    that has ended the last blocks are given back first, as by vLLM.
    """
    assert isinstance(of.load, OfSessions)
    room, gaps_s, block = int(lab.room_blocks(of)), of.load.gaps_s, of.flags.block_size
    cache: OrderedDict[tuple[int, int], None] = OrderedDict()  # (salt, place in the prompt)
    conversations = count(0, of.turns)  # the request that each begins with
    sends = [
        (of.load.begins_s(user), next(conversations) + user % of.turns)
        for user in range(of.load.users)
    ]
    heapq.heapify(sends)
    looked_up = hits = 0
    for nth in range(4000):
        at_s, request = sends[0]
        prompt, output = of.lengths[request % len(of.lengths)]
        blocks, turn = -(-(prompt + output) // block), request % of.turns
        salted = of.workload.chat and of.workload.chat.salted == "request"
        names = [(request if salted else request - turn, i) for i in range(blocks)]
        earlier = of.lengths[request % len(of.lengths) - 1][0] // block if turn else 0
        found = next((i for i, name in enumerate(names[:earlier]) if name not in cache), earlier)
        if nth >= 100:
            looked_up, hits = looked_up + prompt, hits + found * block
        for name in reversed(names):
            cache.pop(name, None)
            cache[name] = None
        while len(cache) > room:
            cache.popitem(last=False)
        following = request + 1 if turn < of.turns - 1 else next(conversations)
        heapq.heapreplace(sends, (at_s + gaps_s[request % len(gaps_s)], following))
    return hits / looked_up


@pytest.mark.parametrize("key", POINTS)
def test_the_formula_is_what_such_a_cache_finds(key: str) -> None:
    of = POINTS[key]
    assert found_by_a_cache(of) == pytest.approx(lab.hit_rate(of).value, abs=0.02)


def test_later_turns_are_told_from_the_first(tmp_path: Path) -> None:
    found = context(tmp_path, LAB, {})
    assert facts.facts(judged_run(found)).turns == ()
    waits_s = [0.2, 0.1, 0.1, 0.1, 0.4, 0.3, 0.3, 0.3]
    sent = [make_record([(10 + wait_s, 1)], index=i) for i, wait_s in enumerate(waits_s)]
    played(found, point("large").key, sent)
    played(found, point("coarse", workload="tenants").key, sent)
    told = facts.facts(judged_run(found))
    of, coarse = told.turns
    assert (told.crowded, told.beside) == ({"large": of}, {"coarse/tenants": coarse})
    assert (of.point, of.sessions) == (point("large").key, 5)
    assert of.first_s.value == pytest.approx(0.3)
    assert of.next_s.value == pytest.approx(0.2)
