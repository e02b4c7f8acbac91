"""Prompts that begin alike by chance: what the engine may find of them in its prefix cache."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from labs.harness.analysis.checks.expected import Expected
from labs.harness.analysis.validity import caveats_of
from loadtests.plan import read_requests, write_requests
from loadtests.prompts import Messages, Writer
from loadtests.workload import Chat, Fixed, Prefix, Request, Samples, Workload
from serving import metrics
from tests.unit.builders import make_engine, make_point, make_record, make_trial, make_workload

BLOCK_TOKENS = 16
Tokenize = Callable[[Messages], Sequence[str]]


def template(before: int, after: int) -> Tokenize:
    """A chat template of so many tokens around the text, which has a token for each word."""

    def tokenize(messages: Messages) -> list[str]:
        text = " | ".join(m["content"] for m in messages if m["role"] != "system").split()
        return [f"<{i}>" for i in range(before)] + text + [f"</{i}>" for i in range(after)]

    return tokenize


def writer(tokenize: Tokenize) -> Writer:
    return Writer(lambda messages: len(tokenize(messages)), tokenize)


def found(requests: Sequence[Request], tokenize: Tokenize, warm: bool = False) -> int:
    """Count the tokens that a cache of whole blocks finds of these prompts, one after another.

    Where it is warm, all were sent before.
    """
    prompts, hits = [tokenize(request.messages) for request in requests], 0
    numbers = dict[tuple[int, tuple[str, ...]], int]()  # (all before a block, its tokens) -> both
    for _ in range(1 + warm):
        hits = 0
        for tokens in prompts:
            before = 0
            for end in range(BLOCK_TOKENS, len(tokens) + 1, BLOCK_TOKENS):
                block = before, tuple(tokens[end - BLOCK_TOKENS : end])
                if end < len(tokens):  # the last token is computed
                    hits += BLOCK_TOKENS * (block in numbers)
                before = numbers.setdefault(block, len(numbers) + 1)
    return hits


def is_warm(
    workload: Workload, requests: Sequence[Request], hits: int, head: int, blocks: int = 100_000
) -> bool:
    """Whether a trial that sent these requests and found so many tokens is taken for a warm one."""
    point = make_point("on", flags={"enable-prefix-caching": True})
    point = replace(point, workload=workload)
    records = [
        make_record(
            [(10.0 + 0.01 * r.index + 0.001 * k, 1) for k in range(1, 5)],
            sent_s=10.0 + 0.01 * r.index, index=r.index, prompt_tokens=r.prompt_tokens,
            alike_tokens=r.alike_tokens,
        )
        for r in requests
    ]  # fmt: skip
    config = {"block_size": str(BLOCK_TOKENS), "num_gpu_blocks": str(blocks)}
    engine = replace(make_engine(records, True, hits), info={metrics.CACHE_CONFIG: config})
    trial = make_trial(records, engine=engine, point=point)
    caveats = caveats_of(trial, Expected(template_tokens=head))
    return any(c.blocks for c in caveats if c.name == "warm prefix cache")


WORKLOADS = [
    make_workload(prompt_tokens=Fixed(tokens=40)),
    make_workload(prompt_tokens=Fixed(tokens=200)),
    make_workload(prompt_tokens=Fixed(tokens=300), prefix=Prefix(tokens=128, groups=2)),
    make_workload(prompt_tokens=Fixed(tokens=120), task="quote"),
    make_workload(prompt_tokens=Fixed(tokens=120), samples=Samples(count=2, together=False)),
    make_workload(prompt_tokens=Fixed(tokens=120), chat=Chat(turns=2, grows_tokens=48)),
]


@functools.cache
def sent(workload: Workload, before: int, after: int) -> list[Request]:
    """What is sent of this workload to a model with this template: the same cold and warm."""
    return workload.requests(600, 1, writer(template(before, after)))


@pytest.mark.parametrize(("before", "after"), [(0, 0), (10, 5), (13, 3), (16, 5), (27, 4)])
@pytest.mark.parametrize("workload", WORKLOADS)
def test_a_cold_cache_is_never_taken_for_a_warm_one(
    workload: Workload, before: int, after: int
) -> None:
    """A template that ends within a block fills it with words of the text, which agree by chance.

    Qwen's has ten tokens before the text and five after it: some 1,300 tokens of 600 prompts were
    found, and none were allowed.
    """
    requests = sent(workload, before, after)
    hits = found(requests, template(before, after))
    assert not is_warm(workload, requests, hits, before)


def test_prefixes_that_the_cache_loses_may_begin_alike() -> None:
    """A prompt of another group that was sent shortly before has the same first block, at times."""
    tokenize = template(10, 5)
    workload = make_workload(prompt_tokens=Fixed(tokens=300), prefix=Prefix(tokens=128, groups=600))
    requests = workload.requests(600, 1, writer(tokenize))
    hits = found(requests, tokenize)
    assert hits
    assert not is_warm(workload, requests, hits, 10, blocks=1000)
    warm = found(requests, tokenize, warm=True)
    assert is_warm(workload, requests, warm, 10, blocks=1000)


@pytest.mark.parametrize(("before", "after"), [(0, 0), (10, 5), (13, 3), (16, 5), (27, 4)])
@pytest.mark.parametrize("workload", WORKLOADS[:4])
def test_a_warm_cache_still_shows(workload: Workload, before: int, after: int) -> None:
    requests = sent(workload, before, after)
    hits = found(requests, template(before, after), warm=True)
    assert is_warm(workload, requests, hits, before)


def test_the_bound_allows_little_more_than_such_prompts_share() -> None:
    requests = sent(WORKLOADS[1], 10, 5)
    hits = found(requests, template(10, 5))
    assert hits > 500
    assert is_warm(WORKLOADS[1], requests, 2 * hits + BLOCK_TOKENS, 10)


def test_a_text_is_alike_as_far_as_its_nearest_other() -> None:
    of = writer(template(10, 5))
    texts = [("", "a b c d"), ("", "x y"), ("", "a b e"), ("", "x y"), ("led", "a b c d")]
    assert of.head_tokens == 10
    assert of.alike(texts) == [2, 7, 2, 7, 0]  # of equal ones what follows the text, too
    assert of.alike([("led by", "a b c"), ("led by", "a b d")]) == [2, 2]
    unknown = Writer(lambda messages: 15 + len(messages[-1]["content"].split()))
    assert unknown.head_tokens == 15
    assert unknown.alike(texts) == [None] * 5


def test_what_is_alike_goes_with_the_request_and_changes_no_prompt(
    tmp_path: Path,
) -> None:
    workload, tokenize = WORKLOADS[1], template(10, 5)
    known = workload.requests(50, 1, writer(tokenize))
    plain = workload.requests(50, 1, Writer(lambda messages: len(tokenize(messages))))
    assert [r.messages for r in known] == [r.messages for r in plain]
    write_requests(tmp_path / "r.jsonl", known, "m")
    kept = read_requests(tmp_path / "r.jsonl")
    assert [r.alike_tokens for r in kept] == [r.alike_tokens for r in known]
    assert any(r.alike_tokens for r in known)
