"""Tokens are the same piece by piece as of the whole text, or the whole text is encoded."""

import random
from collections.abc import Sequence
from typing import Any

import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from loadtests.pieces import by_piece, cuts_before_spaces
from loadtests.prompts import PROSE, tokenizer
from serving.models.catalog import BUNDLED, CACHE

MODEL = CACHE / "models" / BUNDLED
# of Llama 3, and with one digit at a time of Qwen
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
END = "<|end|>"
TEXTS = (
    "the keeper followed two clocks at noon.",
    f"{END}the keeper's 1234 reports, (as {{it}} was); \u00e9t\u00e9 e\u0301{END}\n"
    f"{END}user\nso it is{END}\n",
    "two  spaces in a row",
    "a line \nthat ends with a space \n and begins with one",
    " a space first",
    "a space last ",
    "no-break\u00a0space \u00a0after a space",
    "word",
    " ",
    "",
)


def llama_3() -> Any:
    split = pre_tokenizers.Split(Regex(LLAMA_3), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([split, byte_level])


def trained(cutter: Any, normalizer: Any = None, special: AddedToken | None = None) -> Tokenizer:
    """Return a tokenizer that has merged what often comes together in the prompts."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.normalizer, made.decoder = cutter, normalizer, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[special or END],
        show_progress=False,
    )
    made.train_from_iterator([*TEXTS, "the keeper followed the harbour . and 12 34"] * 4, trainer)
    return made


def encoded(backend: Tokenizer) -> tuple[Any, list[str]]:
    """Return a function that encodes, and the list of what it is given."""
    asked: list[str] = []

    def encode(text: str) -> Sequence[int]:
        asked.append(text)
        ids: list[int] = backend.encode(text, add_special_tokens=False).ids
        return ids

    return encode, asked


@pytest.mark.parametrize(
    ("cutter", "normalizer"),
    [
        (pre_tokenizers.ByteLevel(add_prefix_space=False), None),
        (pre_tokenizers.ByteLevel(add_prefix_space=True), None),
        (llama_3(), normalizers.NFC()),
        (pre_tokenizers.Metaspace(), None),
    ],
    ids=["gpt-2", "with-a-space-first", "llama-3-and-qwen", "t5"],
)
def test_the_tokens_are_those_of_the_whole_text(cutter: Any, normalizer: Any) -> None:
    backend = trained(cutter, normalizer)
    assert cuts_before_spaces(backend)
    encode, _ = encoded(backend)
    pieces = by_piece(encode)
    for text in (*TEXTS, *(f"{a} {b}" for a in TEXTS for b in TEXTS)):
        assert list(pieces(text)) == encode(text), text


def test_a_word_is_encoded_once() -> None:
    encode, asked = encoded(trained(pre_tokenizers.ByteLevel(add_prefix_space=False)))
    pieces = by_piece(encode)
    for _ in range(3):
        pieces("so it is and it is and it is so")
    assert sorted(asked) == [" and", " is", " it", " so", "so"]


@pytest.mark.parametrize(
    "backend",
    [
        trained(None),
        trained(pre_tokenizers.Whitespace()),
        trained(pre_tokenizers.ByteLevel(use_regex=False)),
        trained(pre_tokenizers.ByteLevel(), normalizers.Replace(" ", "\u2581")),
        trained(pre_tokenizers.ByteLevel(), special=AddedToken(END, rstrip=True)),
        trained(pre_tokenizers.ByteLevel(), special=AddedToken("<the end>")),
    ],
    ids=["uncut", "spaces-lost", "bytes", "rewritten", "takes-a-space", "has-one"],
)
def test_a_tokenizer_that_cuts_otherwise_is_left_alone(backend: Tokenizer) -> None:
    assert not cuts_before_spaces(backend)


def test_the_bundled_tokenizer_is_asked_for_words() -> None:
    if not (MODEL / "config.json").exists():
        pytest.skip("the bundled model is not converted yet (`make setup` does it)")
    from transformers import PreTrainedTokenizerFast

    loaded = PreTrainedTokenizerFast.from_pretrained(str(MODEL))
    assert cuts_before_spaces(loaded.backend_tokenizer)
    rng = random.Random(0)
    text = " ".join(PROSE.sentence(rng) for _ in range(400))
    chat = [{"role": "system", "content": "Go on."}, {"role": "user", "content": text}]
    whole = loaded.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert list(tokenizer(str(MODEL))(chat)) == loaded(whole, add_special_tokens=False)["input_ids"]
