"""The CUDA build of vLLM held against the labs, on a machine without a GPU: `make rehearse-cuda`.

An environment of its own gets the packages that serving/locks/cuda.txt names. In it NVML and
`torch.cuda` answer as on one GPU (`stand_in/`), and a libcuda whose every call fails lets vLLM's
libraries load. That is enough for all that vLLM decides before it computes: it reads the arguments
of each engine of each lab, makes its configuration and chooses its attention, builds each model
without memory and chooses what its layers are multiplied with, plays the forecaster's scheduler,
and has the names that the labs read. With what a lean bundle leaves out hidden, it does the same
for random weights.

What it cannot show: that an engine loads weights and lays them out for its kernels, compiles,
captures graphs and answers, or how fast it is.
"""
