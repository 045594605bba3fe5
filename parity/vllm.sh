#!/usr/bin/env bash
# A real vLLM on the CPU loads what trainerd pulled, agrees, and follows the job by
# deploy/inference/vllm.py: vllm.sh TRAINERD PYTHON VLLM
# VLLM is the program of a CPU build (docs/checkpoints.md says which one was tried). Everything is on loopback.
set -euo pipefail
cd "$(dirname "$0")/.."
trainerd=$(realpath "$1") python=$2 vllm=$3
smollm2=${TRAINERD_SMOLLM2:-${XDG_CACHE_HOME:-$HOME/.cache}/trainerd/smollm2/SmolLM2.gguf}
[ -f "$smollm2" ] || { echo "$smollm2 is missing; 'make tools' fetches it" >&2; exit 1; }
dir=$(mktemp -d)
pid=
stop() {
  if [ -n "$pid" ]; then kill "$pid" 2>/dev/null || true; wait "$pid" 2>/dev/null || true; fi
  rm -rf "$dir"
}
trap stop EXIT
"$trainerd" --json import "$smollm2" "dir:$dir/smollm2" > "$dir/import" 2>&1
"$trainerd" --json serve --listen 127.0.0.1:0 --data "$dir/data" --store "dir:$dir/store" --device cpu > "$dir/out" 2> "$dir/err" &
pid=$!
for _ in $(seq 600); do grep -q listening "$dir/out" && break; sleep 0.1; done
addr=$(sed -n 's/.*"msg":"listening","addr":"\([^"]*\)".*/\1/p' "$dir/out")
[ -n "$addr" ] || { echo "the server did not start" >&2; cat "$dir/err" >&2; exit 1; }
HF_HUB_OFFLINE=1 "$python" parity/py/vllm_follow.py "$trainerd" "$vllm" "http://$addr" "$dir" || { tail -n 20 "$dir/err" >&2; tail -n 60 "$dir/vllm.log" >&2 || true; exit 1; }
