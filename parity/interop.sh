#!/usr/bin/env bash
# transformers loads what trainerd published and pulled, and agrees; the examples of
# deploy/inference make the calls they must: interop.sh TRAINERD PYTHON
# Starts its own server on loopback. PYTHON has parity/py/requirements.txt (`make venv`).
set -euo pipefail
cd "$(dirname "$0")/.."
trainerd=$(realpath "$1") python=$2
. parity/server.sh
"$python" deploy/inference/test_engines.py
HF_HUB_OFFLINE=1 "$python" parity/py/interop.py "$trainerd" "http://$addr" "$dir/store" "$dir/smollm2" || { tail -n 20 "$dir/err" >&2; exit 1; }
