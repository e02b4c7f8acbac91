"""The `labs` command where derived models are made in an instant: what a lab and the fake engine
read of them, beside the results, and no weights. The checkout's own models are left alone.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from labs.harness.plan import derived_models
from labs.harness.storage import results
from labs.tiled_attention import probes as tiled_attention
from loadtests.structures import FORMS
from serving.models import dummy, prune
from serving.models.adapters import mark_of
from serving.models.catalog import Model
from serving.models.grammar_masks import BACKENDS
from serving.models.kv_heads import kv_heads_of
from serving.models.outliers import SCHEMES
from tests.fake.bare import with_a_constant_reference_step
from tests.fake.quiet import app
from tests.shards import write_shard

TENANTS = 8
PARAMS_PER_ADAPTER = 460_800  # rank 8 on the attention of the bundled model
DRAFT_LAYERS = 2
ACCEPTANCE = 0.6
STUDY = {
    "passages_tokens": [10, 20],
    "loss_nats": {"none": [30.0, 60.0], **{name: [31.0, 63.0] for name in SCHEMES}},
    "inputs": {},
}

SPARSITY = {
    "passages_tokens": [10, 20],
    "loss_nats": {
        "dense": [30.0, 60.0],
        **{name: [30.0 + 0.1 * n, 60.0 + 0.3 * n] for n, name in enumerate(prune.METHODS)},
    },
    "solved": {name: [True, False] for name in ("dense", *prune.METHODS)},
    "zeros": {name: prune.Method.parse(name).share for name in prune.METHODS},
    "energy_gone": {"dense": 0.0, **{name: 0.01 for name in prune.METHODS}},
    "pruned_params": 100_000_000,
    "held_out_sha256": "0" * 64,
    "calibration_sha256": "1" * 64,
    "calibration_tokens": 2048,
    "seconds": 1.0,
}
TRAINING = {
    "params": 80_000_000,
    "passages_tokens": [10, 20],
    "loss_nats": {
        name: [30.0 + n, 60.0 + 2.1 * n]
        for n, name in enumerate(
            ("plain", "file", "tuned-qat-4", "plain-gptq-4", "plain-nearest-4", "file-nearest-4",
             "spread", "spread-nearest-4", "distilled", "untaught-1", "untaught-2", "kept")
        )
    },
    "efforts": {
        name: {"tokens": 1000, "seconds": 1.0}
        for name in ("plain", "gptq-4", "tuned-qat-4", "distilled", "untaught")
    },
    "calibration_tokens": 500,
    "held_out_sha256": "0" * 64,
}  # fmt: skip
MASKS = {
    "processors": 2,
    "vocabulary": 49_152,
    "backends": {
        backend: {
            "error": None,
            "start_s": 1.0,
            "forms": {
                form: {"compile_s": 0.01, "again_s": 0.001, "mask_s": 0.0001} for form in FORMS
            },
        }
        for backend in BACKENDS
    },
}
GGUF: dict[str, dict[str, object]] = {
    "gguf": {"weight_bytes": 269_100_288},
    "gguf-q4": {
        "weight_bytes": 116_483_328,
        "passages_tokens": [10, 20],
        "loss_nats": {"bf16": [30.0, 60.0], "q4": [32.0, 64.0]},
    },
}

STUDIES = {"outliers": STUDY, "masks": MASKS, "sparsity": SPARSITY}


def folder_of(name: str, results: Path) -> Path:
    return results.with_name("made") / name


def make(
    model: Model,
    name: str,
    report: Callable[[str], None],
    quick: bool = False,
    made_here: bool = False,
) -> Path:
    folder = folder_of(name, results.RESULTS)
    if folder.exists():
        return folder
    if model.dummy:  # a configuration, which takes an instant to write
        shutil.copytree(dummy.derive(model, name), folder)
        return folder
    report(f"Making a fake {name}")
    folder.mkdir(parents=True)
    if name == "adapters":
        about = {"rank": 8, "params_per_adapter": PARAMS_PER_ADAPTER}
        (folder / "about.json").write_text(json.dumps(about))
        for tenant in range(TENANTS):
            for suffix in ("", "-rank-64"):
                adapter = folder / f"tenant-{tenant}{suffix}"
                adapter.mkdir()
                (adapter / "mark.txt").write_text(mark_of(tenant))
        return folder
    if name in STUDIES:
        (folder / "about.json").write_text(json.dumps(STUDIES[name]))
        return folder
    if name in GGUF:  # the fake engine reads a folder in its place
        (folder / "model.gguf").symlink_to(model.path.resolve())
        (folder / "about.json").write_text(json.dumps(GGUF[name]))
        return folder
    (folder / "tokenizer.json").symlink_to(model.path.resolve() / "tokenizer.json")
    config = json.loads((model.path / "config.json").read_text())
    if name in ("draft", "eagle"):
        config["num_hidden_layers"] = DRAFT_LAYERS
        (folder / "about.json").write_text(json.dumps({"acceptance": ACCEPTANCE}))
    if name == "training":
        config["num_hidden_layers"] //= 2
        (folder / "about.json").write_text(json.dumps(TRAINING))
    if name in ("mha", "mqa"):
        config["num_key_value_heads"] = kv_heads_of(name, config)
    (folder / "config.json").write_text(json.dumps(config))
    if name in prune.METHODS:
        _pruned(model, folder, prune.Method.parse(name))
        return folder
    _half_as_large(model, folder / "model.safetensors")
    return folder


def _pruned(model: Model, folder: Path, method: prune.Method) -> None:
    """The record of the zeros, and weights as large as the model's own."""
    about = {"asked": method.share, "zeros": method.share, "groups_too_full": 0,
             "pruned_params": SPARSITY["pruned_params"]}  # fmt: skip
    (folder / "about.json").write_text(json.dumps(about))
    _weights(model.shape.weight_bytes, folder / "model.safetensors")


def _half_as_large(model: Model, path: Path) -> None:
    _weights(model.shape.weight_bytes // 2, path)


def _weights(size: int, path: Path) -> None:
    """Weights of one tensor, as large as is said."""
    tensor = {"dtype": "I8", "shape": [size], "data_offsets": [0, size]}
    write_shard(path, {"model.weight": tensor})


if __name__ == "__main__":
    derived_models.make = make
    tiled_attention.ARGV = (sys.executable, "-m", "tests.brief_attention")
    with_a_constant_reference_step()
    app()
