"""What the makers of models share, on a tiny random Llama."""

from pathlib import Path

from serving.weights import making
from tests.unit.builders import write_tiny_llama
from tests.weights import needs_torch, torch

pytestmark = needs_torch


def test_answers_are_greedy_whatever_a_model_recommends(tmp_path: Path) -> None:
    _, model = making.load(write_tiny_llama(tmp_path / "tiny", layers=2, initializer_range=0.3))
    answer = making.answer(model, [[5, 6, 7]], 24, eos_token_id=-1).tolist()
    model.generation_config.repetition_penalty = 50.0
    assert making.answer(model, [[5, 6, 7]], 24, eos_token_id=-1).tolist() == answer
    repeated = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=24, eos_token_id=-1)
    assert repeated[:, 3:].tolist() != answer  # the recommendation would have been felt
