"""A model for the tests of labs on a real engine: the bundled model with few of its layers.

`python -m tests.shallow OUT_FOLDER LAYERS` writes it. The layers, the embeddings and the output
matrix are the bundled model's own; what it writes makes no sense. With two layers it takes a step
in a fraction of the time, and models are derived from it as much faster. So it shows that a lab
works as a whole, and nothing about what the lab's technique gains or costs.
"""

from __future__ import annotations

import fcntl
import subprocess
import sys
from pathlib import Path

from serving import atomic
from serving.models import catalog, draft
from serving.models.catalog import ROOT
from tests import with_vllm

LAYERS = 2  # of 30


def shallow(layers: int = LAYERS) -> Path:
    """Find the folder of the model; make it first if need be, one process for all."""
    folder = catalog.CACHE / "models" / f"{catalog.BUNDLED}-{layers}-layers"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            argv = with_vllm.python("tests.shallow", str(folder), str(layers))
            subprocess.run(argv, cwd=ROOT, check=True, timeout=300)
    return folder


def write(out: Path, layers: int) -> None:
    """Write the model folder, whole or not at all."""
    import torch
    import transformers

    source = catalog.bundled()
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    draft.prune(model, layers)
    with atomic.folder(out) as half:
        model.save_pretrained(half)
        transformers.AutoTokenizer.from_pretrained(source).save_pretrained(half)


if __name__ == "__main__":
    write(Path(sys.argv[1]), int(sys.argv[2]))
