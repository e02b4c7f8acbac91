"""The CUDA build of vLLM held against the labs, on a machine without a GPU: `make rehearse-cuda`.

An environment of its own gets the packages that serving/locks/cuda.txt names. In it NVML and
`torch.cuda` answer as on one GPU (`stand_in/`), and a libcuda whose every call fails lets vLLM's
libraries load. That is enough for all that vLLM decides before it computes: it reads the arguments
of each engine of each lab, makes its configuration and chooses its attention, plays the
forecaster's scheduler, and has the names that the labs read.

What it cannot show: that an engine loads weights, compiles, captures graphs and answers, which
kernels it multiplies with, or how fast it is.
"""
