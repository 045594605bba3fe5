#!/usr/bin/env python3
"""Makes a running vLLM load what `trainerd pull` has put in its model's directory.

    trainerd pull --follow --exec deploy/inference/vllm.py JOB /models/policy -- http://127.0.0.1:8000

vLLM must serve that directory, with its development routes and sleep mode:

    VLLM_SERVER_DEV_MODE=1 vllm serve /models/policy --enable-sleep-mode

Steps: the engine sleeps (level 2: weights and cache are given back; requests under
way are aborted), its weights are allocated again and read from TRAINERD_DIR, and
it goes on with an empty cache. When the weights cannot be read the engine stays
asleep, since it has none to serve; the failure is the program's: `trainerd pull`
reports it and tries again.

vLLM 0.32 on the CPU keeps the old output layer of a model with tied embeddings
and says so only in its log; see docs/checkpoints.md.

Standard library only. VLLM_API_KEY is sent as a bearer token.
"""

import json
import os
import sys
import urllib.error
import urllib.parse
import urllib.request

TIMEOUT = 300  # seconds for one call


def call(base, path, query=None, body=None, method="POST"):
    url = base.rstrip("/") + path + ("?" + urllib.parse.urlencode(query, doseq=True) if query else "")
    request = urllib.request.Request(url, method=method, data=None if body is None else json.dumps(body).encode())
    if body is not None:
        request.add_header("Content-Type", "application/json")
    if os.environ.get("VLLM_API_KEY"):
        request.add_header("Authorization", "Bearer " + os.environ["VLLM_API_KEY"])
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            return answer.read()
    except urllib.error.HTTPError as e:
        sys.exit(f"vllm: {method} {path}: {e.code} {e.read(300).decode(errors='replace')}")
    except OSError as e:
        sys.exit(f"vllm: {method} {path}: {e}")


def reload(base, directory):
    call(base, "/sleep", {"level": "2"})
    try:
        call(base, "/wake_up", {"tags": ["weights"]})
        call(base, "/collective_rpc", body={"method": "reload_weights", "kwargs": {"weights_path": directory}})
        call(base, "/wake_up", {"tags": ["kv_cache"]})
    except SystemExit:
        print("vllm: the engine is left asleep: it has no weights to serve", file=sys.stderr)
        raise
    call(base, "/reset_prefix_cache")  # what was computed by the old weights


if __name__ == "__main__":
    missing = [name for name in ("TRAINERD_DIR", "TRAINERD_STEP") if name not in os.environ]
    if len(sys.argv) != 2 or missing:
        sys.exit(f"usage: vllm.py http://HOST:PORT, run by trainerd pull --exec (missing: {', '.join(missing) or 'nothing'})")
    reload(sys.argv[1], os.environ["TRAINERD_DIR"])
    print(f"vllm: serves step {os.environ['TRAINERD_STEP']} of {os.environ['TRAINERD_DIR']}")
