"""An EAGLE head: what it sees, what it is held against, and that it learns from a tiny Llama."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from serving.models import draft, eagle
from serving.models.draft import TargetAnswer
from serving.models.eagle import Head, make, share_right
from tests.unit.builders import write_tiny_llama
from tests.weights import made, torch
from tests.weights.test_draft import write_prompts

WIDTH = 10  # of a head whose hidden states are the tokens, one in each dimension


def perfect(monkeypatch: pytest.MonkeyPatch, wrong: tuple[int, ...] = ()) -> Head:
    """A head that guesses the token after next, but for its second guess at these places."""
    head = object.__new__(Head)
    head.matrix = torch.eye(WIDTH)

    def passes(batch: list[TargetAnswer]) -> list[Any]:
        (answer,) = batch
        tokens = torch.tensor([*(answer.prompt + answer.tokens)[2:], 0])
        missed = tokens.clone()
        missed[list(wrong)] += 1
        one_hot = torch.nn.functional.one_hot
        return [one_hot(guessed, WIDTH)[None].float() for guessed in (tokens, missed)]

    monkeypatch.setattr(head, "passes", passes)
    return head


def answered() -> TargetAnswer:
    prompt, tokens = [1, 2, 3], [4, 5, 6, 7]
    thought = torch.tensor((prompt + tokens)[1:])  # the state at a token holds the next one
    return TargetAnswer("k", prompt, tokens, torch.nn.functional.one_hot(thought, WIDTH).float())


def test_a_guess_is_held_against_the_state_that_it_guesses(monkeypatch: pytest.MonkeyPatch) -> None:
    guessed, of_target = perfect(monkeypatch).guess([answered()])
    assert torch.equal(guessed, of_target)
    # the first token comes with the prompt; the second guess of a draft is of one token less
    assert of_target.argmax(-1).tolist() == [5, 6, 7, 6, 7]


def test_a_draft_is_accepted_up_to_its_first_wrong_guess(monkeypatch: pytest.MonkeyPatch) -> None:
    assert perfect(monkeypatch).accepted([answered()], 4)["all"] == [1.0, 1.0]
    # drafts begin after 4 and after 5; the second guess of the first is at the place of 4
    assert perfect(monkeypatch, (3,)).accepted([answered()], 4)["k"] == [1.0, 0.5]
    assert share_right([1.0, 0.5]) == 0.75  # four guesses are checked, and three are right


def test_a_guess_sees_the_target_up_to_where_its_draft_began() -> None:
    seen = (eagle._mask(3, 2)[0, 0] == 0).tolist()
    causal = [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert seen[:3] == [[bool(s) for s in [*row, 0, 0, 0]] for row in causal]
    before = [[0, 0, 0], [1, 0, 0], [1, 1, 0]]
    own = [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert seen[3:] == [[bool(s) for s in a + b] for a, b in zip(before, own, strict=True)]


def test_a_head_learns_and_is_written_as_vllm_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    tiny = write_tiny_llama(tmp_path / "tiny", layers=4, initializer_range=0.3)
    prompts = write_prompts(tmp_path / "p", 48)
    monkeypatch.setattr(eagle, "LEARNING_RATE", 1e-2)

    def after(epochs: int) -> dict[str, Any]:
        monkeypatch.setattr(eagle, "EPOCHS", epochs)
        return made(make, tiny, tmp_path / f"{epochs}", source=prompts)

    untrained, trained = after(0), after(8)
    assert trained["trained_on_tokens"] == 32 * draft.ANSWER_TOKENS
    assert trained["acceptance"] > 2 * max(untrained["acceptance"], 0.01)
    assert trained["acceptance_untrained"] == untrained["acceptance"]
    assert trained["acceptance_within"][64].keys() == {"even", "odd", "all"}
    weights = load_file(tmp_path / "8" / "model.safetensors")
    target = AutoModelForCausalLM.from_pretrained(tiny)
    embeddings = target.get_input_embeddings().weight.bfloat16()
    assert torch.equal(weights["embed_tokens.weight"], embeddings)
    assert "layers.0.self_attn.q_proj.weight" in weights
    assert not any("input_layernorm" in name for name in weights)
    config = AutoConfig.from_pretrained(tmp_path / "8")
    assert (config.num_hidden_layers, config.architectures) == (1, ["LlamaForCausalLM"])
