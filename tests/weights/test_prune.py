"""Pruning a tiny random Llama: which weights go, what is written, and what is scored of it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from serving.models import prune, sparsity
from serving.models.catalog import Model
from serving.models.making import MakerError
from serving.models.outliers import linears
from serving.models.prune import Method, Zeros, dropped
from tests.unit.builders import SHAPE, write_tiny_llama
from tests.weights import made, needs_torch, torch

pytestmark = needs_torch

TEXT = "\n\n".join(f"the {n} quick brown foxes jump over {n + 1} lazy dogs" for n in range(9))


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_tiny_llama(tmp_path / "tiny", layers=2, initializer_range=0.3)


def calibration(folder: Path) -> Path:
    path = folder / "calibration.txt"
    path.write_text(TEXT)
    return path


def weights(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return dict(load_file(folder / "model.safetensors"))


def rows_of_zeros(mask: Any) -> list[list[int]]:
    return [row.nonzero().flatten().tolist() for row in mask]


# --------------------------------------------------------------------------------- which ones go


def test_the_smallest_of_a_matrix_go_by_magnitude_and_of_each_row_by_wanda() -> None:
    scores = torch.tensor([[1.0, 2.0, 3.0, 4.0], [10.0, 30.0, 20.0, 40.0]])
    assert rows_of_zeros(dropped(scores, Method("magnitude", "50"))) == [[0, 1, 2, 3], []]
    assert rows_of_zeros(dropped(scores, Method("wanda", "50"))) == [[0, 1], [0, 2]]


def test_two_of_four_neighbours_stay_in_the_pattern() -> None:
    scores = torch.tensor([[5.0, 6.0, 7.0, 8.0, 1.0, 2.0, 4.0, 3.0]])
    for by in prune.SELECTIONS:
        assert rows_of_zeros(dropped(scores, Method(by, "2-4"))) == [[0, 1, 4, 5]]


def test_equal_weights_are_told_apart_so_that_the_share_is_exact() -> None:
    assert dropped(torch.ones(4, 10), Method("magnitude", "30")).sum() == 12
    assert dropped(torch.ones(4, 10), Method("wanda", "30")).sum(1).tolist() == [3, 3, 3, 3]


def test_wanda_keeps_a_small_weight_that_meets_a_large_input(tiny: Path) -> None:
    """One channel of what enters attention is 100 times as large: its weights all stay."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    layer = model.model.layers[0]
    layer.input_layernorm.weight.data[5] = 100.0
    matrix = layer.self_attn.q_proj.weight.data
    before = matrix.clone()
    norms = prune.input_norms(model, torch.randint(0, 256, (2, 16)))
    seen = norms["model.layers.0.self_attn.q_proj"]
    assert seen.argmax() == 5
    prune.prune(model, Method("wanda", "50"), norms)
    assert (matrix[:, 5] == before[:, 5]).all()
    assert (matrix == 0).sum(1).tolist() == [16] * 32  # half of each row
    kept = matrix != 0
    assert torch.equal(matrix[kept], before[kept])  # what stays is not changed
    scores = before.abs() * seen
    assert (scores.masked_fill(kept, 0).amax(1) <= scores.masked_fill(~kept, 1e9).amin(1)).all()


def test_the_energy_that_goes_is_that_of_the_weights_that_went(tiny: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    matrices = [m.weight.data for m in linears(model).values()]
    before = sum(float(w.pow(2).sum()) for w in matrices)
    gone = prune.prune(model, Method("magnitude", "40"), {})
    assert gone == pytest.approx(1 - sum(float(w.pow(2).sum()) for w in matrices) / before)


# ------------------------------------------------------------------------------ what is written


@pytest.mark.parametrize("method", ["magnitude-50", "wanda-30", "wanda-2-4"])
def test_the_written_model_has_the_zeros_and_nothing_else_is_changed(
    tiny: Path, tmp_path: Path, method: str
) -> None:
    out = tmp_path / "out"
    about = made(prune.make, tiny, out, method=method, source=calibration(tmp_path))
    before, after = weights(tiny), weights(out)
    assert before.keys() == after.keys()
    counted = Zeros()
    for name, weight in after.items():
        if "_proj" in name:
            counted.count(weight)
            assert torch.equal(weight[weight != 0], before[name][weight != 0])
        else:
            assert torch.equal(weight, before[name])
    asked = Method.parse(method).share
    assert counted.share == pytest.approx(asked, abs=0.02)
    assert about["zeros"] == counted.share
    assert about["pruned_params"] == counted.weights < about["params"]
    assert (counted.groups_too_full == 0) == (method == "wanda-2-4")
    assert bool(about["calibration_sha256"]) == method.startswith("wanda")
    assert (out / "config.json").read_bytes() == (tiny / "config.json").read_bytes()
    assert (out / "tokenizer.json").exists()
    size = (tiny / "model.safetensors").stat().st_size
    assert (out / "model.safetensors").stat().st_size == size  # zeros are stored


def test_a_file_without_the_zeros_is_refused() -> None:
    found = Zeros()
    found.count(torch.ones(8, 8))
    with pytest.raises(MakerError, match=r"0\.00% of the written weights are zero"):
        prune._require(found, Method("wanda", "50"))
    halves = Zeros()
    halves.count(torch.tensor([[1.0, 1, 1, 0, 1, 0, 0, 0]]))
    prune._require(halves, Method("wanda", "50"))
    with pytest.raises(MakerError, match="1 groups of four"):
        prune._require(halves, Method("wanda", "2-4"))


@pytest.mark.parametrize("method", ["wanda-55", "2-4", "random-50", "wanda"])
def test_an_unknown_method_is_answered_with_the_known_ones(method: str) -> None:
    with pytest.raises(MakerError, match=r"known: magnitude-10, .*wanda-2-4"):
        Method.parse(method)


# ---------------------------------------------------------------------------------- what is scored


def texts(folder: Path) -> Path:
    passages = TEXT.split("\n\n")
    path = folder / "texts.json"
    given = {"calibration": passages[:5], "held_out": passages[5:], "examples": 1,
             "tasks": [[["a b", "c"], ["a b", "c"], ["d", "e"]]]}  # fmt: skip
    path.write_text(json.dumps(given))
    return path


def test_every_sparsity_is_scored_and_the_model_is_restored(tiny: Path, tmp_path: Path) -> None:
    methods = ("magnitude-50", "wanda-70", "magnitude-50")
    about = sparsity.make(tiny, tmp_path, texts(tmp_path), methods)
    assert list(about["loss_nats"]) == ["dense", "magnitude-50", "wanda-70"]
    assert {len(v) for v in about["loss_nats"].values()} == {4} == {len(about["passages_tokens"])}
    assert {name: len(v) for name, v in about["solved"].items()} == {"dense": 2, "magnitude-50": 2}
    assert about["zeros"]["wanda-70"] == pytest.approx(0.7, abs=0.03)
    assert 0 < about["energy_gone"]["magnitude-50"] < 0.5
    # what came before the second time has left nothing behind
    alone = sparsity.make(tiny, tmp_path, texts(tmp_path), methods[:1])
    for name in ("dense", "magnitude-50"):
        assert alone["loss_nats"][name] == pytest.approx(about["loss_nats"][name], rel=1e-4)


def test_losses_are_those_of_the_whole_model(tiny: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    passages = [[5, 7, 11, 13, 17], [2, 3, 4]]
    with torch.no_grad():
        wanted = [
            float(model(torch.tensor([p]), labels=torch.tensor([p])).loss) * (len(p) - 1)
            for p in passages
        ]
    assert sparsity.losses(model, passages) == pytest.approx(wanted, rel=1e-4)


def test_a_task_is_solved_where_each_token_of_the_answer_is_the_likeliest(tiny: Path) -> None:
    """A model that copies the last token's successor in a table: `x` is followed by a new line."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    after = {"q": " ", " ": "x", "x": "\n"}
    ids = {c: tokenizer(c, add_special_tokens=False)["input_ids"][0] for c in "qxy \n"}

    class Copying:
        device = model.device

        def base_model(self, rows: Any, use_cache: bool) -> Any:
            return type("Out", (), {"last_hidden_state": rows.unsqueeze(-1).float()})

        def get_output_embeddings(self) -> Any:
            table = {ids[a]: ids[b] for a, b in after.items()}

            def head(states: Any) -> Any:
                found = [table.get(int(s), 0) for s in states.flatten()]
                return torch.nn.functional.one_hot(torch.tensor(found), 256)

            return head

    blocks = [[("q", "y"), ("q", "x"), ("q", "y"), ("q", "xx")]]
    assert sparsity.solved(tokenizer, Copying(), blocks, 1) == [True, False, False]


def test_what_the_lab_gives_it_has_every_task_and_no_text_twice(tmp_path: Path) -> None:
    from labs.harness.analysis.evaluation import SHOTS, tasks_with_shots
    from labs.harness.plan.derived_models import scored_texts

    model = Model("any", tmp_path, SHAPE)
    given = json.loads(scored_texts(tmp_path / "texts.json", model, 1).read_text())
    assert not set(given["calibration"]) & set(given["held_out"])
    assert given["examples"] == SHOTS
    assert sum(len(b) - SHOTS for b in given["tasks"]) == len(tasks_with_shots())
    assert math.prod(map(len, given["tasks"])) > 0
