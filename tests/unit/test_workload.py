"""How long prompts and answers are."""

import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from loadtests.arrivals import Concurrent
from loadtests.plan import read_requests, write_requests
from loadtests.prompts import Writer
from loadtests.workload import (
    BLOCK,
    Adapters,
    Chat,
    Exponential,
    Fixed,
    Intruder,
    Prefix,
    Request,
    Samples,
    Workload,
)
from tests.cases import each
from tests.unit.builders import make_workload, words

VARYING = Exponential(mean_tokens=100, max_tokens=400)
WORKLOAD = Workload(
    name="chat", prompt_tokens=VARYING, output_tokens=VARYING, loads=(Concurrent(users=1),)
)


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


def test_lengths_are_cut_at_both_ends_and_never_zero() -> None:
    assert max(VARYING.draw(BLOCK, random.Random(0))) == 400
    assert min(Exponential(mean_tokens=1, max_tokens=9).draw(BLOCK, random.Random(0))) == 1
    cut = Exponential(min_tokens=3, mean_tokens=4, max_tokens=9).draw(BLOCK, random.Random(0))
    assert (min(cut), max(cut)) == (3, 9)


@pytest.mark.parametrize(("least", "mean", "most"), [(1, 5, 4), (6, 5, 9)])
def test_a_mean_beyond_the_cuts_is_refused(least: int, mean: int, most: int) -> None:
    with pytest.raises(ValidationError, match=f"min_tokens={least} and max_tokens={most}"):
        Exponential(min_tokens=least, mean_tokens=mean, max_tokens=most)


def test_a_drawn_length_is_that_of_the_first_turn_and_later_ones_grow_on_it() -> None:
    workload = WORKLOAD.model_copy(
        update={"prompt_tokens": VARYING, "chat": Chat(turns=3, grows_tokens=10)}
    )
    prompts = [prompt for prompt, _ in workload.lengths(30, seed=0)]
    assert all(later - prompts[i - 1] == 10 for i, later in enumerate(prompts) if i % 3)
    assert len(set(prompts[::3])) > 5


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


def test_groups_come_in_the_order_that_is_given_and_it_begins_again() -> None:
    requests = drawn(8, prefix=Prefix(tokens=30, groups=4, order=(2, 2, 0)))
    texts = [user_words(request)[:30] for request in requests]
    assert [text == texts[0] for text in texts] == [True, True, False] * 2 + [True, True]
    assert texts[2] == texts[5]
    wrongs: list[dict[str, Any]] = [{"order": (0, 4)}, {"order": (0,), "favourite": 0.5}]
    for wrong in wrongs:
        with pytest.raises(ValueError, match="order"):
            Prefix(tokens=30, groups=4, **wrong)
    with pytest.raises(ValueError, match="primed"):
        make_workload(prefix=Prefix(tokens=30, groups=4, order=(0, 1)), primed=True)


@each(("tokens", "shared"), [(1, 0), (30, 29), (50, 48)])
def test_a_prefix_that_counts_the_template_leaves_room_for_it(tokens: int, shared: int) -> None:
    texts = [user_words(r) for r in drawn(20, prefix=Prefix(tokens=tokens, with_template=True))]
    assert len({tuple(text[:shared]) for text in texts}) == 1
    assert len({tuple(text[shared:]) for text in texts}) > 1


def test_prefix_longer_than_the_prompt_is_refused() -> None:
    short = WORKLOAD.model_copy(
        update={"prompt_tokens": Fixed(tokens=20), "prefix": Prefix(tokens=30)}
    )
    with pytest.raises(ValueError, match=r"prompt_tokens=20 .* 32 tokens"):
        short.requests(1, 0, Writer(words))


# ------------------------------------------------------------------------------- how prompts begin


def drawn(n: int, seed: int = 0, **fields: Any) -> list[Request]:
    """Requests of a workload whose prompts have 50 tokens unless it says otherwise."""
    workload = make_workload(**{"prompt_tokens": Fixed(tokens=50), **fields})
    requests = workload.requests(n, seed, Writer(words))
    assert [(words(r.messages), r.output_tokens) for r in requests] == workload.lengths(n, seed)
    assert requests == workload.requests(n, seed, Writer(words))
    return requests


def user_words(request: Request) -> list[str]:
    return request.messages[-1]["content"].split()


def documents(request: Request) -> list[tuple[str, ...]]:
    text = user_words(request)
    return [tuple(text[i : i + 10]) for i in range(0, 40, 10)]


def test_documents_are_pieces_of_equal_length_in_one_order() -> None:
    requests = drawn(24, prefix=Prefix(tokens=40, documents=4))
    first = documents(requests[0])
    assert len(set(first)) == 4
    assert all(documents(r) == first for r in requests)
    assert len({tuple(user_words(r)[40:]) for r in requests}) == 24


def test_shuffled_documents_are_the_same_pieces_in_every_order() -> None:
    requests = drawn(600, prefix=Prefix(tokens=40, documents=4, shuffled=True))
    assert len({frozenset(documents(r)) for r in requests}) == 1
    orders = Counter(tuple(documents(r)) for r in requests)
    assert len(orders) == 24
    assert max(orders.values()) < 2.5 * 600 / 24  # none is preferred: 25 each, give or take 5


def test_a_chat_carries_its_earlier_turns_and_begins_anew() -> None:
    requests = drawn(7, chat=Chat(turns=3, grows_tokens=20))
    assert [r.prompt_tokens for r in requests] == [50, 70, 90, 50, 70, 90, 50]
    for i, request in enumerate(requests):
        roles = [m["role"] for m in request.messages]
        assert roles == ["system", *["user", "assistant"] * (i % 3), "user"]
        if i % 3:
            before = requests[i - 1].messages
            assert request.messages[: len(before)] == before
            assert len(request.messages[-2]["content"].split()) == 10  # half of what it grows by
    assert len({r.messages[1]["content"] for r in requests}) == 3  # a conversation each


def test_a_task_comes_first_and_counts() -> None:
    for task in ("story", "quote", "edit", "code"):
        (asked,) = {r.messages[-1]["content"].partition(":")[0] for r in drawn(5, task=task)}
        assert len(asked.split()) > 5


def test_what_is_to_be_edited_is_in_every_sentence_or_statement() -> None:
    for request in drawn(5, task="edit"):
        _, text = request.messages[-1]["content"].split(": ", 1)
        sentences = text.split(". ")[:-1]  # the last is cut to the prompt's length
        assert sentences
        assert sum("the " in s.lower() for s in sentences) > len(sentences) / 2
    for request in drawn(5, task="code"):
        _, code = request.messages[-1]["content"].split(": ", 1)
        statements = re.findall(r"[^;{}]+;|\w+ \([^)]*\)", code)
        assert len(statements) > 3
        assert sum("count" in s for s in statements) > len(statements) / 2


# ------------------------------------------------------------------------------- who asks for what


def test_every_fourth_request_is_the_intruders() -> None:
    intruder = Intruder(prompt_tokens=200, output_tokens=2)
    requests = drawn(12, loads=("contended:2/1",), intruder=intruder)
    assert [r.index for r in requests if r.intruder] == [3, 7, 11]
    assert [r.prompt_tokens for r in requests[:4]] == [50, 50, 50, 200]
    assert [r.output_tokens for r in requests[:4]] == [4, 4, 4, 2]


def test_adapters_in_turn() -> None:
    requests = drawn(7, adapters=Adapters(count=3, suffix="-rank-64"))
    assert [r.tenant for r in requests] == [0, 1, 2, 0, 1, 2, 0]
    assert requests[2].adapter == "tenant-2-rank-64"
    assert all((r.tenant, r.adapter) == (None, None) for r in drawn(3))


def test_adapters_by_zipfs_law() -> None:
    """Shares of 1, 1/2, 1/3 and 1/4 over 25/12; four standard errors of the largest are 0.6%."""
    zipf = make_workload(adapters=Adapters(count=4, mix="zipf"))
    n = 100_000
    shares = Counter(zipf.tenants(n, seed=1))
    measured = [shares[k] / n for k in range(4)]
    assert measured == pytest.approx([0.48, 0.24, 0.16, 0.12], abs=0.0065)
    assert zipf.tenants(50, 1) == zipf.tenants(60, 1)[:50]
    assert zipf.tenants(50, 1) != zipf.tenants(50, 2)


def test_a_draw_of_adapters_is_the_same_on_any_machine_and_python() -> None:
    zipf = make_workload(adapters=Adapters(count=8, mix="zipf"))
    assert zipf.tenants(16, seed=0) == [6, 1, 1, 1, 0, 5, 7, 7, 3, 1, 5, 7, 3, 1, 0, 1]


def test_who_asks_does_not_change_what_is_asked() -> None:
    """So that a base and its adapters are compared on the same prompts."""
    plain, tenants = drawn(6), drawn(6, adapters=Adapters(count=2, mix="zipf"))
    assert [r.messages for r in plain] == [r.messages for r in tenants]


def test_requests_take_priorities_in_turn_and_0_is_not_sent(tmp_path: Path) -> None:
    """An engine that does not schedule by priority refuses a request that names one."""
    write_requests(tmp_path / "requests.jsonl", drawn(4, priorities=(0, 2, 1)), "base")
    bodies = [json.loads(p.body) for p in read_requests(tmp_path / "requests.jsonl")]
    assert [b.get("priority") for b in bodies] == [None, 2, 1, None]
    assert "priorities" not in make_workload().model_dump()


def test_a_conversation_or_each_of_its_requests_has_a_salt(tmp_path: Path) -> None:
    def salts(**salted: Any) -> list[str | None]:
        path = tmp_path / "requests.jsonl"
        write_requests(path, drawn(4, chat=Chat(turns=2, grows_tokens=40, **salted)), "base")
        return [json.loads(p.body).get("cache_salt") for p in read_requests(path)]

    assert salts() == [None] * 4
    first, again, second, _ = salts(salted="conversation")
    assert first
    assert first == again != second
    assert len({*salts(salted="request")}) == 4


def test_a_planned_request_asks_its_adapter_and_says_whose_it_is(tmp_path: Path) -> None:
    requests = drawn(4, loads=("contended:2/1",), intruder=Intruder(prompt_tokens=90),
                     adapters=Adapters(count=2))  # fmt: skip
    requests[1] = drawn(2)[1]
    write_requests(tmp_path / "requests.jsonl", requests, "base")
    planned = read_requests(tmp_path / "requests.jsonl")
    models = [json.loads(p.body)["model"] for p in planned]
    assert models == ["tenant-0", "base", "tenant-0", "tenant-1"]
    assert [p.intruder for p in planned] == [False, False, False, True]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prefix": Prefix(tokens=9), "task": "story"}, "each say how prompts begin"),
        ({"prefix": Prefix(tokens=9), "chat": Chat(turns=2, grows_tokens=9)}, "each say how"),
        ({"intruder": Intruder(prompt_tokens=9)}, "or neither"),
        ({"primed": True}, "nothing to prime"),
        ({"samples": Samples(count=4), "chat": Chat(turns=2, grows_tokens=4)}, "no prefix, chat"),
        ({"loads": ("replay:1",)}, "a replay needs a trace: workloads.short.trace=FILE"),
        ({"trace": ((0.0, 9, 9),), "chat": Chat(turns=2, grows_tokens=9)}, "cannot be combined"),
        ({"loads": ("contended:2/1",)}, "or neither"),
        ({"loads": ("sessions:2/1",)}, "sessions need a chat, .* workloads.short.chat="),
        (
            {"loads": ("contended:2/1", "concurrent:2"), "intruder": Intruder(prompt_tokens=9)},
            "or neither",
        ),
    ],
)
def test_parts_that_do_not_go_together_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        make_workload(**fields)


def test_a_trace_gives_lengths_and_times(tmp_path: Path) -> None:
    file = tmp_path / "trace.csv"
    file.write_text("timestamp,input_tokens,output_tokens\n10,40,5\n12.5,60,7\n")
    traced = make_workload("replay:1", trace=str(file))
    assert traced.lengths(3, seed=1) == [(40, 5), (60, 7), (40, 5)]
    assert traced.longest_tokens == 67
    requests = traced.requests(3, 1, Writer(words))
    assert [(r.due_s, r.prompt_tokens, r.output_tokens) for r in requests] == [
        (0.0, 40, 5), (2.5, 60, 7), (None, 40, 5),
    ]  # fmt: skip
    write_requests(tmp_path / "requests.jsonl", requests, "base")
    assert [p.due_s for p in read_requests(tmp_path / "requests.jsonl")] == [0.0, 2.5, None]
    assert Workload.model_validate_json(traced.model_dump_json()) == traced  # without the file


def test_longest_context_counts_every_turn_and_the_intruder() -> None:
    assert WORKLOAD.longest_tokens == 400 + 400
    assert make_workload(chat=Chat(turns=3, grows_tokens=20)).longest_tokens == 6 + 4 + 2 * 20
    for tokens, longest in ((7, 10), (200, 203)):
        intruder = Intruder(prompt_tokens=tokens, output_tokens=3)
        workload = make_workload("contended:2/1", intruder=intruder)
        assert workload.longest_tokens == longest
