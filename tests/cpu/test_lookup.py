"""What is looked up, held against vLLM's own code, which is imported here."""

from __future__ import annotations

import random

import numpy as np
import pytest

from serving.models.ngram_lookup import looked_up

pytestmark = pytest.mark.cpu


def test_what_is_looked_up_is_what_the_engine_would_propose() -> None:
    proposer = pytest.importorskip("vllm.v1.spec_decode.ngram_proposer")
    rng = random.Random(0)
    for least, most, guesses in ((1, 1, 16), (2, 4, 3), (3, 3, 2)):
        for _ in range(200):
            text = rng.choices(range(4), k=rng.randint(1, 30))
            proposed = proposer._find_longest_matched_ngram_and_propose_tokens(
                np.array(text, dtype=np.int32), least, most, 1000, guesses
            )
            assert list(looked_up(text, guesses, least, most)) == proposed.tolist(), text
