#!/usr/bin/env bash
# A real vLLM on the CPU loads what trainerd pulled, agrees, and follows the job by
# deploy/inference/vllm.py: vllm.sh TRAINERD PYTHON VLLM
# VLLM is the program of a CPU build (docs/checkpoints.md says which one was tried). Everything is on loopback.
set -euo pipefail
cd "$(dirname "$0")/.."
trainerd=$(realpath "$1") python=$2 vllm=$3
. parity/server.sh
HF_HUB_OFFLINE=1 "$python" parity/py/vllm_follow.py "$trainerd" "$vllm" "http://$addr" "$dir" || { tail -n 20 "$dir/err" >&2; tail -n 60 "$dir/vllm.log" >&2 || true; exit 1; }
