#!/usr/bin/env bash
# What deltas between steps save on SmolLM2-135M in bfloat16: delta.sh TRAINERD PYTHON [LR]
# Starts its own server on loopback. PYTHON has parity/py/requirements.txt (`make venv`).
set -euo pipefail
cd "$(dirname "$0")/.."
trainerd=$(realpath "$1") python=$2 lr=${3:-3e-6}
. parity/server.sh
HF_HUB_OFFLINE=1 "$python" parity/py/delta.py "$trainerd" "http://$addr" "$dir" "$lr" || { tail -n 20 "$dir/err" >&2; exit 1; }
