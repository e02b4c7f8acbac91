"""A fixed plan on fixed step times, and what vLLM's scheduler makes of it, version by version.

`vllm-0.32.json` was made on a CPU. `vllm-0.26.json` was made by the CUDA build of 0.26 (as in
serving/locks/cuda.txt) without a GPU: NVML, `torch.cuda` and libcuda were stood in for, as on one
H100; `make rehearse` plays it there again. Those between are of the CPU builds 0.27.1, 0.28.0,
0.29.0, 0.30.0 and 0.31.0, beside the other packages of serving/locks/cpu.txt. Where the installed
vLLM has no file, this writes it:

    python -m tests.golden | python -m tests.golden.plays > tests/golden/vllm-<version>.json
"""
