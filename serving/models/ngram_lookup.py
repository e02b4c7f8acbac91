"""Look up in a text what followed its last tokens before, as vLLM's n-gram proposer does."""

from __future__ import annotations

from collections.abc import Sequence


def looked_up(tokens: Sequence[int], guesses: int, least: int, most: int) -> Sequence[int]:
    """Guess what follows: what followed the longest n-gram that ends here, where it came first.

    So does vLLM's n-gram proposer (Saxena 2023, prompt lookup decoding). The n-gram has from
    `least` to `most` tokens. Empty where the last `least` tokens came nowhere before.
    """
    for size in range(min(most, len(tokens) - 1), least - 1, -1):
        last = tuple(tokens[-size:])
        for start in range(len(tokens) - size):
            if tuple(tokens[start : start + size]) == last:
                return tokens[start + size : start + size + guesses]
    return ()
