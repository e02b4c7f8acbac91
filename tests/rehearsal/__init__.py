"""A short session on a locked-down GPU box, rehearsed without one: `make rehearse`.

What a reader would do there is done here, by the clock: the parts of a bundle come one by one, with
the time that a transfer takes; `bash bundle/go.sh` is called again and again; a call that has not
ended by its limit is killed outright, and every second one earlier, in the middle of what it does.
NVML is a stand-in for an H100, and the engines are the fake one with an H100's law, its starts
included; every model is the one that the box would serve. First the plan is printed: what each lab
will take, and at most. It takes as long as the session would, so it is no part of the tests that
run by themselves; `SECONDS=` sets how long a call may last.

What it cannot show: that vLLM starts there, and how fast it is. A client with fewer cores than the
box has sends less than an H100 would serve, so disturbed trials are kept. The last lines say what
else is kinder than the box.
"""
