#!/usr/bin/env python3
"""Makes a running SGLang load what `trainerd pull` has put in a directory.

    trainerd pull --follow --exec deploy/inference/sglang.py JOB /models/policy -- http://127.0.0.1:30000

Steps: generation pauses, the weights are read from TRAINERD_DIR under the version
"JOB@STEP", the cache of the old weights goes, generation continues. It continues
after a failure too, with the weights that the engine has; the failure is the
program's: `trainerd pull` reports it and tries again.

Standard library only. SGLANG_API_KEY is sent as a bearer token.
"""

import json
import os
import sys
import urllib.error
import urllib.request

TIMEOUT = 300  # seconds for one call


def call(base, path, body):
    request = urllib.request.Request(base.rstrip("/") + path, method="POST", data=json.dumps(body).encode(), headers={"Content-Type": "application/json"})
    if os.environ.get("SGLANG_API_KEY"):
        request.add_header("Authorization", "Bearer " + os.environ["SGLANG_API_KEY"])
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            return answer.read()
    except urllib.error.HTTPError as e:
        sys.exit(f"sglang: POST {path}: {e.code} {e.read(300).decode(errors='replace')}")
    except OSError as e:
        sys.exit(f"sglang: POST {path}: {e}")


def reload(base, directory, version):
    call(base, "/pause_generation", {"mode": "retract"})
    try:
        answer = call(base, "/update_weights_from_disk", {"model_path": directory, "weight_version": version, "flush_cache": True})
        try:
            done = json.loads(answer)
        except ValueError:
            sys.exit(f"sglang: POST /update_weights_from_disk: {answer[:300]!r} is not JSON")
        if not done.get("success"):
            sys.exit(f"sglang: POST /update_weights_from_disk: {done.get('message', done)}")
    finally:
        call(base, "/continue_generation", {})


if __name__ == "__main__":
    missing = [name for name in ("TRAINERD_DIR", "TRAINERD_JOB", "TRAINERD_STEP") if name not in os.environ]
    if len(sys.argv) != 2 or missing:
        sys.exit(f"usage: sglang.py http://HOST:PORT, run by trainerd pull --exec (missing: {', '.join(missing) or 'nothing'})")
    reload(sys.argv[1], os.environ["TRAINERD_DIR"], f"{os.environ['TRAINERD_JOB']}@{os.environ['TRAINERD_STEP']}")
    print(f"sglang: serves step {os.environ['TRAINERD_STEP']} of {os.environ['TRAINERD_DIR']}")
