"""Turns a text into tokens piece by piece, and each piece only once.

Most tokenizers first cut a text into pieces, before each space among other places, and no token
reaches over a cut. Then a word has the same tokens wherever it stands, and a prompt of ten thousand
tokens from a few hundred words needs no more work than to look these up. The tokens are the same
as those of the whole text: a tokenizer that cuts otherwise, and a text with spaces in a row, are
left to the tokenizer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from itertools import chain, product
from typing import Any

Encode = Callable[[str], Sequence[int]]

MOST_PIECES = 100_000  # that are remembered, of 100 bytes each or so
_ENDS = ("word", "Word", "7", "word.", "word's", "x;", "(x)", "{", "}", "=", '"', "<|", "|>", "é")


class _SpacesInARow(Exception):
    """Signals that a text cannot be cut at each of its spaces."""


class _Pieces(dict[str, Sequence[int]]):
    """Maps a word to the tokens that it has after a space; encodes it when it is first asked for.

    Raises _SpacesInARow for one that begins or ends with white space, or is empty.
    """

    def __init__(self, encode: Encode) -> None:
        super().__init__()
        self._encode = encode

    def __missing__(self, word: str) -> Sequence[int]:
        if not word or word[0].isspace() or word[-1].isspace():
            raise _SpacesInARow
        tokens = self._encode(f" {word}")
        if len(self) < MOST_PIECES:
            self[word] = tokens
        return tokens


def by_piece(encode: Encode) -> Encode:
    """Return a function that encodes as `encode` does, which must cut a text before each space."""
    pieces = _Pieces(encode)
    end = functools.lru_cache(maxsize=4096)(encode)  # of a text: the chat template is about it

    def encode_by_piece(text: str) -> Sequence[int]:
        first, *words = text.split(" ")
        if not words or not first or first[-1].isspace() or not words[-1].strip():
            return encode(text)
        last = words.pop()
        if last[0].isspace():
            return encode(text)
        try:
            between = chain.from_iterable(map(pieces.__getitem__, words))
            return [*end(first), *between, *end(f" {last}")]
        except _SpacesInARow:
            return encode(text)

    return encode_by_piece


def cuts_before_spaces(backend: Any) -> bool:
    """Tell whether a tokenizer of the package `tokenizers` cuts texts before each space.

    Those of GPT-2, Llama 3 and Qwen do. One that first rewrites a text (Gemma's puts a mark in the
    place of each space), or makes no cuts, is not taken to, nor one in which a special token has a
    space in it or takes the one after it.
    """
    normalizer, cutter = backend.normalizer, backend.pre_tokenizer
    if cutter is None or type(normalizer).__name__ not in ("NoneType", "NFC"):
        return False
    if any(t.rstrip or " " in t.content for t in backend.get_added_tokens_decoder().values()):
        return False
    sample = " ".join(word for pair in product(_ENDS, repeat=2) for word in pair)
    cuts = {begin for _, (begin, _) in cutter.pre_tokenize_str(sample)}
    return all(at in cuts for at, character in enumerate(sample) if character == " ")
