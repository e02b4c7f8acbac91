"""The `labs` command where derived models are made in an instant: what a lab and the fake engine
read of them, beside the results, and no weights. The checkout's own models are left alone.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

from labs.filing import results
from labs.running import derived_models
from loadtests.structures import FORMS
from serving.adapters import mark_of
from serving.masks import BACKENDS
from serving.models import Model
from serving.outliers import SCHEMES
from tests.fake.quiet import app

TENANTS = 8
PARAMS_PER_ADAPTER = 460_800  # rank 8 on the attention of the bundled model
DRAFT_LAYERS = 2
ACCEPTANCE = 0.6
STUDY = {
    "passages_tokens": [10, 20],
    "loss_nats": {"none": [30.0, 60.0], **{name: [31.0, 63.0] for name in SCHEMES}},
    "inputs": {},
}

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


def folder_of(name: str, results: Path) -> Path:
    return results.with_name("made") / name


def make(model: Model, name: str, report: Callable[[str], None], quick: bool = False) -> Path:
    folder = folder_of(name, results.RESULTS)
    if folder.exists():
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
    if name in ("outliers", "masks"):
        study = STUDY if name == "outliers" else MASKS
        (folder / "about.json").write_text(json.dumps(study))
        return folder
    if name == "gguf":  # the fake engine reads a folder in its place
        (folder / "model.gguf").symlink_to(model.path.resolve())
        return folder
    (folder / "tokenizer.json").symlink_to(model.path.resolve() / "tokenizer.json")
    config = json.loads((model.path / "config.json").read_text())
    if name == "draft":
        config["num_hidden_layers"] = DRAFT_LAYERS
        (folder / "about.json").write_text(json.dumps({"acceptance": ACCEPTANCE}))
    if name == "mha":
        config["num_key_value_heads"] = config["num_attention_heads"]
    (folder / "config.json").write_text(json.dumps(config))
    _half_as_large(model, folder / "model.safetensors")
    return folder


def _half_as_large(model: Model, path: Path) -> None:
    """A header that says so; nobody reads the rest."""
    size = model.shape.weight_bytes // 2
    tensor = {"dtype": "I8", "shape": [size], "data_offsets": [0, size]}
    header = json.dumps({"model.weight": tensor}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)


if __name__ == "__main__":
    derived_models.make = make
    app()
