"""What the lab predicts of sessions, by hand and by a cache; and what it tells of them."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import pytest

from labs import LABS
from labs.agent_sessions import facts, lab
from labs.harness.spec import Point
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
    assert lab.turn_blocks(small) == [5, 7, 9, 11]
    assert lab.others_blocks(small) == 4 * 8
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
    assert (coarse.kv_room_tokens, lab.turn_blocks(coarse)) == (plain.kv_room_tokens, [1, 1, 2, 2])
    assert lab.found_tokens(coarse) == 256 / 4  # of the last turn's prompt alone
    assert lab.found_tokens(point("large", workload="strangers")) == 0


def found_by_a_cache(of: Point) -> float:
    """The share of prompt tokens found by a cache that forgets the least recently used block.

    Sessions take turns, each at another turn of its conversation; of a request that has ended the
    last blocks are given back first, as by vLLM.
    """
    room, users = int(lab.room_blocks(of)), of.load.users
    cache: OrderedDict[tuple[int, int], None] = OrderedDict()  # (salt, place in the prompt)
    conversation, turn = [*range(users)], [user % of.turns for user in range(users)]
    looked_up = hits = 0
    for request in range(100 * users):
        user = request % users
        prompt, output = of.lengths[turn[user]]
        blocks = -(-(prompt + output) // of.flags.block_size)
        salted_apart = of.workload.name == "strangers"
        names = [(request if salted_apart else conversation[user], i) for i in range(blocks)]
        earlier = of.lengths[turn[user] - 1][0] // of.flags.block_size if turn[user] else 0
        found = next((i for i, name in enumerate(names[:earlier]) if name not in cache), earlier)
        if request >= 10 * users:
            looked_up, hits = looked_up + prompt, hits + found * of.flags.block_size
        for name in reversed(names):
            cache.pop(name, None)
            cache[name] = None
        while len(cache) > room:
            cache.popitem(last=False)
        turn[user] += 1
        if turn[user] == of.turns:
            turn[user], conversation[user] = 0, users + request
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
