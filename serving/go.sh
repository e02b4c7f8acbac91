#!/bin/bash
# The same line at every call, on a machine where a command is ended after some minutes:
#
#     bash bundle/go.sh
#
# It keeps the parts of the bundle that have come, outside the tree, where they stay between calls.
# Once all are there it unpacks them, once, and goes on with the labs for as long as this call may
# last. Killed at any moment and called again, it goes on. What it takes from the environment:
#
#     LIMIT_S   how long one call may last, from its begin (530)
#     LAB_HOME  where the lab goes (~/inference-serving-lab)
#     OUT       where the archives of results and the log go (bundle/out)
#     PYTHON    the Python that has torch (python3)
#
# Further arguments go to `labs all`, as in: bash bundle/go.sh --only single-stream,multi-lora
# Exit codes: 0, everything is done; 75, not yet: call it again, with the next part if one is to come.
set -u
limit=${LIMIT_S:-530} # bash counts in SECONDS how long it has been running
here=$(cd "$(dirname "$0")" && pwd) || exit 1
lab=${LAB_HOME:-$HOME/inference-serving-lab}
out=$(mkdir -p "${OUT:-$here/out}" && cd "${OUT:-$here/out}" && pwd) || exit 1

"${PYTHON:-python3}" "$here/unbundle.py" --collect "$lab" || exit
# What is compiled in one call is there in the next. Kernels of other models stay uncompiled.
export VLLM_CACHE_ROOT="$lab/.cache/vllm" TRITON_CACHE_DIR="$lab/.cache/triton"
cd "$lab" || exit 1
left=$((limit - SECONDS))
echo "$SECONDS s for the bundle, $left s left for the labs"
if [ "$left" -le 12 ]; then
	echo "No time is left for the labs in this call: call it again."
	exit 75
fi
timeout --signal=INT --kill-after=20 "$left" .unbundled/bin/labs all --quick --weights dummy \
	--seconds "$((left - 10))" --archive "$out/results.tar.gz" "$@" 2>&1 | tee -a "$out/log.txt"
exit "${PIPESTATUS[0]}"
