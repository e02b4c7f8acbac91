"""A short session on a locked-down GPU box, rehearsed without one: `make rehearse`.

What a reader would do there is done here, by the clock: the parts of a bundle come one by one, with
the time that a transfer takes; `bash bundle/go.sh` is called again and again; every second call is
killed outright in the middle of what it does, the others end by themselves. NVML is a stand-in for
an H100, and the engines are the fake one with an H100's law, its starts included. First the plan is
printed: what each lab will take. It takes as long as the session would, so it is no part of the
tests that run by themselves; `SECONDS=` sets how long a call may last.

What it cannot show: that vLLM starts there, and how fast it is. A client with fewer cores than the
box has sends less than an H100 would serve.
"""
