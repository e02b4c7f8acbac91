"""A fixed plan on fixed step times, and what vLLM's scheduler makes of it, version by version.

`vllm-0.32.json` was made on a CPU, `vllm-0.26.json` with the CUDA build of 0.26 (as in
serving/locks/cuda.txt) without a GPU: NVML, `torch.cuda` and libcuda were stood in for, as on one
H100. Where the installed vLLM has no file, this writes it:

    python -m tests.golden | python -m tests.golden.plays > tests/golden/vllm-<version>.json
"""
