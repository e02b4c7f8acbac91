"""How long prompts and answers are."""

import hashlib
import random

import numpy as np
import pytest
from pydantic import ValidationError

from loadtests.arrivals import Concurrent
from loadtests.prompts import Messages, Writer
from loadtests.workload import BLOCK, Exponential, Fixed, Prefix, Workload

VARYING = Exponential(mean_tokens=100, max_tokens=400)
WORKLOAD = Workload(
    name="chat", prompt_tokens=VARYING, output_tokens=VARYING, loads=(Concurrent(users=1),)
)


def words(messages: Messages) -> int:
    return sum(len(m["content"].split()) for m in messages)


def test_every_block_holds_the_same_lengths_in_another_order() -> None:
    drawn = VARYING.draw(4 * BLOCK, random.Random(1))
    blocks = [drawn[i : i + BLOCK] for i in range(0, len(drawn), BLOCK)]
    assert len({tuple(sorted(block)) for block in blocks}) == 1
    assert len({tuple(block) for block in blocks}) == 4


def test_another_seed_changes_only_the_order() -> None:
    one, other = (VARYING.draw(BLOCK, random.Random(seed)) for seed in (1, 2))
    assert one != other
    assert sorted(one) == sorted(other)


def test_lengths_are_exponential_quantiles() -> None:
    lengths = sorted(Exponential(mean_tokens=1000, max_tokens=10**6).draw(BLOCK, random.Random(0)))
    assert np.mean(lengths) == pytest.approx(1000, rel=0.02)
    assert np.std(lengths) == pytest.approx(1000, rel=0.1)
    assert np.median(lengths) == pytest.approx(693, rel=0.02)  # ln 2


def test_lengths_are_cut_at_the_most_and_never_zero() -> None:
    assert max(VARYING.draw(BLOCK, random.Random(0))) == 400
    assert min(Exponential(mean_tokens=1, max_tokens=9).draw(BLOCK, random.Random(0))) == 1


def test_fixed_lengths_are_all_the_same() -> None:
    assert Fixed(tokens=7).draw(3, random.Random(0)) == [7, 7, 7]


def test_most_below_mean_is_refused() -> None:
    with pytest.raises(ValidationError, match="max_tokens=4 is below mean_tokens"):
        Exponential(mean_tokens=5, max_tokens=4)


def test_lengths_are_the_same_on_any_machine_and_python() -> None:
    lengths = WORKLOAD.lengths(512, seed=3)
    assert hashlib.sha256(repr(lengths).encode()).hexdigest()[:16] == "13d8eca9213ddcbd"


def test_lengths_do_not_depend_on_how_many_are_asked_for() -> None:
    assert WORKLOAD.lengths(512, seed=3)[:100] == WORKLOAD.lengths(100, seed=3)


def test_prompt_and_output_lengths_are_drawn_apart() -> None:
    prompts, outputs = zip(*WORKLOAD.lengths(1024, seed=3), strict=True)
    assert abs(np.corrcoef(prompts, outputs)[0, 1]) < 0.1


def test_requests_have_exactly_the_drawn_lengths() -> None:
    long = Workload(
        name="chat",
        prompt_tokens=Fixed(tokens=50),
        output_tokens=VARYING,
        loads=(Concurrent(users=1),),
    )
    requests = long.requests(70, 3, Writer(words))
    assert [(words(r.messages), r.output_tokens) for r in requests] == long.lengths(70, 3)
    assert [r.prompt_tokens for r in requests] == [50] * 70
    assert [r.index for r in requests] == list(range(70))
    assert requests == long.requests(70, 3, Writer(words))
    assert len({str(r.messages) for r in requests}) == 70


def test_requests_of_a_group_begin_alike_and_groups_take_turns() -> None:
    shared = Workload(
        name="rag",
        prompt_tokens=Fixed(tokens=50),
        output_tokens=Fixed(tokens=4),
        prefix=Prefix(tokens=30, groups=3),
        loads=(Concurrent(users=1),),
    )
    requests = shared.requests(12, 0, Writer(words))
    texts = [r.messages[-1]["content"].split() for r in requests]
    assert {words(r.messages) for r in requests} == {50}
    assert [texts[i][:30] == texts[0][:30] for i in range(12)] == [True, False, False] * 4
    assert len({tuple(text[30:]) for text in texts}) == 12


def test_prefix_longer_than_the_prompt_is_refused() -> None:
    short = WORKLOAD.model_copy(
        update={"prompt_tokens": Fixed(tokens=20), "prefix": Prefix(tokens=30)}
    )
    with pytest.raises(ValueError, match="prompt_tokens=20 is below the 32 tokens"):
        short.requests(1, 0, Writer(words))


def test_longest_context_is_the_most_of_both_parts() -> None:
    mixed = WORKLOAD.model_copy(update={"prompt_tokens": Fixed(tokens=32)})
    assert mixed.longest_tokens == 32 + 400
