#!/bin/bash
# The same line at every call, on a machine where a command is ended after some minutes:
#
#     bash bundle/go.sh
#
# It keeps the parts of the bundle that have come, outside the tree, where they stay between calls.
# Once all are there it unpacks them, once, and goes on with the labs for as long as this call may
# last. Killed at any moment and called again, it goes on. What it takes from the environment:
#
#     LIMIT_S   how long one call may last, from its begin (530); 30 s more where something hangs
#     LAB_HOME  where the lab goes (~/inference-serving-lab, or beside OUT where that is read-only)
#     OUT       where the archives of results and the log go (bundle/out)
#     PYTHON    the Python that has torch (python3)
#
# Further arguments go to `labs all`, as in: bash bundle/go.sh --only single-stream,multi-lora
# Exit codes: 0, everything is done; 75, not yet: call it again, with the next part if one is to come;
# 1, something failed, or labs are left that were not finished: the last lines say which, and why.
set -u
limit=${LIMIT_S:-530} # bash counts in SECONDS how long it has been running
here=$(cd "$(dirname "$0")" && pwd) || exit 1
out=$(mkdir -p "${OUT:-$here/out}" && cd "${OUT:-$here/out}" && pwd) || exit 1

writable() { mkdir -p "$1" 2> /dev/null && [ -w "$1" ]; }
call_again() {
	echo "The labs are not done: call it again."
	exit 75
}
# After this a call that is killed leaves an archive, too: what is in it was recorded before.
pack() {
	local most=$((limit + 25 - SECONDS))
	[ "$most" -gt 0 ] || return
	timeout --kill-after=3 "$((most < 60 ? most : 60))" .unbundled/bin/python -m labs.harness.filing.archive "$out/results.tar.gz" >> "$out/log.txt" 2>&1
}

lab=${LAB_HOME:-${HOME:+$HOME/inference-serving-lab}}
if ! writable "$lab"; then
	beside=$(dirname "$out")/inference-serving-lab
	if [ -n "${LAB_HOME:-}" ] || ! writable "$beside"; then
		echo "error: no folder for the lab: ${lab:-HOME, which is not set,} cannot be written. Name one in LAB_HOME that stays between calls." >&2
		exit 1
	fi
	lab=$beside
	echo "The home folder cannot be written: the lab goes to $lab (LAB_HOME= names another folder)"
	export XDG_CACHE_HOME="$lab/.cache/home" XDG_CONFIG_HOME="$lab/.cache/home" # vLLM's among others
fi
lab=$(cd "$lab" && pwd) || exit 1

"${PYTHON:-python3}" "$here/unbundle.py" --collect "$lab" || exit
# What is compiled in one call is there in the next. Kernels of other models stay uncompiled.
export VLLM_CACHE_ROOT="$lab/.cache/vllm" TRITON_CACHE_DIR="$lab/.cache/triton"
cd "$lab" || exit 1
# Once for each bundle, and never again where that was killed.
examined=.unbundled/examined
left=$((limit - SECONDS))
if [ "$left" -gt 30 ] && ! [ "$examined" -nt .unbundled/manifest.json ]; then
	touch "$examined"
	timeout --kill-after=5 "$((left < 120 ? left : 120))" .unbundled/bin/labs doctor --weights dummy 2>&1 | tee -a "$out/log.txt"
fi
pack
left=$((limit - SECONDS))
echo "$SECONDS s for the bundle, $left s left for the labs"
[ "$left" -gt 30 ] || call_again
# Labs end by themselves 10 s before they are interrupted, and are killed 15 s after that.
timeout --signal=INT --kill-after=15 "$((left - 10))" .unbundled/bin/labs all --quick --weights dummy \
	--seconds "$((left - 20))" --archive "$out/results.tar.gz" "$@" 2>&1 | tee -a "$out/log.txt"
code=${PIPESTATUS[0]}
case $code in
124 | 130 | 137 | 143) # interrupted or killed, by `timeout` or otherwise
	pack
	call_again
	;;
esac
exit "$code"
