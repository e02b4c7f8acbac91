"""The CUDA build of vLLM, held against the labs on a machine without a GPU: `make rehearse`.

`environment` installs the lock for CUDA. In it every process has a stand-in for one GPU (`device`
for `torch.cuda`, `stand_in` for NVML, a libcuda whose calls fail) and runs a module of checks:

    names       what the lab reads of vLLM by name: routes, metrics, lines of the log, hooks
    configure   vLLM's configuration of every engine that the labs would start
    build       each distinct model on PyTorch's meta device, and what computes its layers
"""

from pathlib import Path

NVML = Path(__file__).parent / "stand_in"
"""The folder that stands in for NVML, for PYTHONPATH."""
