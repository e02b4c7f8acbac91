"""Puts the logprobs of a run's quality probes into columns, and restores the probes from them.

Every variant of a run scores the same texts, and figures compare two of them over the tokens that
both know. So a position's tokens stand there once for all: those that the first variant, the base,
knows, the likeliest first, then others that two variants or more know. What a single other variant
knows enters no figure and is left out, except the token that it finds likeliest. Figures ask which
token is the text's own, and which each variant finds likeliest: these have their ids, and of the
others, which are half of such a file, it is enough that they are told apart.

A logprob is kept as how far it lies below the likeliest of its position, in whole steps of
2**-`grid` nat: of a base from one id to the next, of another variant by its difference to the
base's. Engines compute logits in 16 bits, so that a coarse step gives nearly all logprobs back to
the last of their five decimals. Where none does, `grid` is null, and a step is that last decimal.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

DECIMALS = 5  # of an engine's logprobs
UNNAMED = 1 << 31  # above every token's id: these and the following stand for ids that are not kept
GRIDS = range(3, 12)
AS_RECORDED = 2.1 * 10**-DECIMALS  # two rounded logprobs may differ by so much from their step
Known = Mapping[int, float]
Column = list[int | None]


def take(probes: dict[str, Any], order: Sequence[str]) -> dict[str, Any] | None:
    """Take the logprobs out of the results of these probes; None where they are not comparable."""
    evaluations = [
        (name, place, answer)
        for name in order
        for place, answer in enumerate(probes[name]["answers"])
    ]
    texts = [[p["token_ids"] for p in answer["passages"]] for _, _, answer in evaluations]
    if not texts or any(text != texts[0] for text in texts):
        return None
    passages = [
        _columns(token_ids, [_known(answer["passages"][place]) for _, _, answer in evaluations])
        for place, token_ids in enumerate(texts[0])
    ]
    for name in order:
        answers = [{k: v for k, v in a.items() if k != "passages"} for a in probes[name]["answers"]]
        probes[name] = {**probes[name], "answers": answers}
    return {"evaluations": [[name, place] for name, place, _ in evaluations], "passages": passages}


def restore(probes: dict[str, Any], columns: Mapping[str, Any]) -> None:
    """Put the logprobs back into the results of the probes that they were taken from."""
    for number, (name, place) in enumerate(columns["evaluations"]):
        answer = probes[name]["answers"][place]
        answer["passages"] = [
            {"token_ids": passage["token_ids"], "known": _restored(passage, number)}
            for passage in columns["passages"]
        ]


def _known(passage: Mapping[str, Any]) -> list[Known]:
    return [{int(i): logprob for i, logprob in known.items()} for known in passage["known"]]


def _columns(token_ids: Sequence[int], evaluations: Sequence[Sequence[Known]]) -> dict[str, Any]:
    """Put one text into columns: a list for each position, of each evaluation in turn."""
    columns: dict[str, Any] = {
        "token_ids": token_ids,
        "grid": [],
        "ids": [],
        "likeliest": [[] for _ in evaluations],
        "below": [[] for _ in evaluations],
    }
    for token, *known in zip(token_ids, *evaluations, strict=True):
        tops = [max(of.values()) for of in known]
        firsts = [
            min(i for i, logprob in of.items() if logprob == top)
            for of, top in zip(known, tops, strict=True)
        ]
        base = known[0]
        by_rank = sorted(base, key=lambda i: -base[i])
        shared = [i for i, count in Counter(i for of in known for i in of).items() if count > 1]
        ids = list(dict.fromkeys([*by_rank, token, *firsts, *shared]))
        grid = _grid(known, tops, ids)
        columns["grid"].append(grid)
        columns["ids"].append([i if i in (token, *firsts) else None for i in ids])
        steps = [
            [round((top - of[i]) * _steps_a_nat(grid)) if i in of else None for i in ids]
            for of, top in zip(known, tops, strict=True)
        ]
        reference = _reference(steps[0])
        for number, (column, top) in enumerate(zip(steps, tops, strict=True)):
            columns["likeliest"][number].append(top)
            against = [0, *reference[:-1]] if number == 0 else reference
            columns["below"][number].append(_difference(column, against, -1))
    return columns


def _grid(known: Sequence[Known], tops: Sequence[float], ids: Sequence[int]) -> int | None:
    """Find the coarsest step that gives all logprobs of a position back as they were recorded."""
    below = [top - of[i] for of, top in zip(known, tops, strict=True) for i in ids if i in of]
    for grid in GRIDS:
        if all(abs(nats - round(nats * 2**grid) / 2**grid) <= AS_RECORDED for nats in below):
            return grid
    return None


def _steps_a_nat(grid: int | None) -> int:
    return 10**DECIMALS if grid is None else 1 << grid


def _reference(column: Sequence[int | None]) -> list[int]:
    """Return the base's steps; an id that it does not know counts as its last one that it does."""
    reference, last = [], 0
    for value in column:
        last = last if value is None else value
        reference.append(last)
    return reference


def _difference(column: Sequence[int | None], reference: Sequence[int], sign: int) -> Column:
    return [
        None if value is None else value + sign * by
        for value, by in zip(column, reference, strict=True)
    ]


def _restored(passage: Mapping[str, Any], number: int) -> list[dict[str, float]]:
    """Restore what one evaluation knew at each position of a text."""
    positions = []
    for place, (grid, ids) in enumerate(zip(passage["grid"], passage["ids"], strict=True)):
        steps, last = list[int | None](), 0
        for gap in passage["below"][0][place]:
            last = last if gap is None else last + gap
            steps.append(None if gap is None else last)
        if number:
            steps = _difference(passage["below"][number][place], _reference(steps), 1)
        top = passage["likeliest"][number][place]
        positions.append(
            {
                str(UNNAMED + rank if i is None else i): round(
                    top - step / _steps_a_nat(grid), DECIMALS
                )
                for rank, (i, step) in enumerate(zip(ids, steps, strict=True))
                if step is not None
            }
        )
    return positions
