"""The measurement of parity/delta.sh: delta.py TRAINERD URL DIR LR

SA-GRPO steps on SmolLM2 with completions that the server samples itself and
rewards that a rule gives (the share of lower-case letters), published in
bfloat16. Prints what share of the values each step changed and what the delta
weighs, and holds `trainerd pull --delta` against the published files.
"""

import json
import pathlib
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import requests
from tokenizers import Tokenizer

from interop import ARROW, call, stream, tokens

STEPS, GROUPS, SIZE, LENGTH = 6, 2, 4, 24
PROMPTS = ["The door of the old house", "A short list of fruits:", "Water boils when", "The capital of France is",
           "Once upon a time there was", "To open the file, first", "My favourite animal is", "The server answered with",
           "In the morning we", "The answer is", "Two plus two", "She looked at the map and"]


def values(path):
    """A safetensors file's values as 16-bit words."""
    raw = path.read_bytes()
    head = int.from_bytes(raw[:8], "little")
    kinds = {t["dtype"] for name, t in json.loads(raw[8:8 + head]).items() if name != "__metadata__"}
    assert kinds == {"BF16"}, kinds
    return np.frombuffer(raw, np.uint16, offset=8 + head)


def wait(base, step):
    """Waits up to ten minutes for the checkpoint of a step."""
    for _ in range(20):
        r = requests.get(f"{base}/checkpoints/latest", params={"wait": "30s"} | ({"after": step - 1} if step else {}), timeout=120)
        if r.status_code == 200 and r.json()["step"] == step:
            return
        assert r.status_code in (200, 304, 404), r.text
    raise AssertionError(f"no checkpoint of step {step}")


def main():
    trainerd, url, root, lr = sys.argv[1], sys.argv[2], pathlib.Path(sys.argv[3]), float(sys.argv[4])
    text = Tokenizer.from_file(str(root / "smollm2" / "tokenizer.json"))
    job = call("POST", f"{url}/v1/jobs", json={
        "model": {"source": f"dir:{root / 'smollm2'}"}, "objective": {"group_size": SIZE}, "optimizer": {"lr": lr},
        "batch": {"groups_per_step": GROUPS, "max_tokens_per_micro_batch": 512}, "checkpoint": {"dtype": "BF16", "keep_last": 0, "snapshot_every_steps": 0},
        "sampling": {"max_sequences": GROUPS * SIZE, "max_tokens": 1024}, "max_steps": STEPS}).json()
    base = f"{url}/v1/jobs/{job['id']}"
    for step in range(STEPS):
        wait(base, step)
        prompts = [text.encode(p).ids for p in PROMPTS[2 * step:2 * step + 2]]
        done = call("POST", f"{base}/sample", json={"prompts": prompts, "n": SIZE, "max_tokens": LENGTH, "temperature": 1.0, "seed": step}).json()["completions"]
        reward = [sum(c.islower() for c in s) / max(len(s), 1) for s in (text.decode(c["tokens"]) for c in done)]
        body = stream({"group_id": [f"s{step}-{c['prompt']}" for c in done], "prompt_tokens": tokens([prompts[c["prompt"]] for c in done]),
                       "completion_tokens": tokens([c["tokens"] for c in done]), "reward": reward,
                       "sampler_logprobs": pa.array([c["logprobs"] for c in done], pa.list_(pa.float32()))})
        call("POST", f"{base}/rollouts", data=body, headers={"Content-Type": ARROW})
    wait(base, STEPS)
    manifests = {m["step"]: m for m in call("GET", f"{base}/checkpoints").json()["checkpoints"]}
    files = {s: root / "store" / m["prefix"] / "hf" for s, m in manifests.items()}
    size = sum(f["size"] for f in manifests[STEPS]["files"] if f["name"].startswith("hf/"))
    print(f"SmolLM2-135M BF16, SA-GRPO, lr {lr:g}: a checkpoint has {size} bytes")
    pulled = root / "pulled"

    def pull(step, *more):
        return subprocess.run([trainerd, "pull", "--server", url, "--step", str(step), *more, job["id"], str(pulled)], check=True, capture_output=True, text=True).stdout

    pull(0)
    for a, b in [(s, s + 1) for s in range(STEPS)] + [(0, STEPS), (STEPS, 0)]:
        x, y = values(files[a] / "model.safetensors"), values(files[b] / "model.safetensors")
        began = time.monotonic()
        delta = len(call("GET", f"{base}/checkpoints/{b}/delta", params={"from": a}).content)
        took = time.monotonic() - began
        print(f"step {a} to {b}: {np.mean(x != y):.4%} of the values changed; the delta has {delta} bytes, {delta / size:.2%} of the checkpoint, in {took:.1f} s")
        out = pull(b, "--delta")
        assert "whole files of 0;" in out, out
        assert (pulled / "model.safetensors").read_bytes() == (files[b] / "model.safetensors").read_bytes()
    grads = [r["metrics"]["grad_norm"] for r in call("GET", f"{base}/steps").json()["steps"]]
    print("gradient norms:", " ".join(f"{g:.2f}" for g in grads))
    print("every pull by delta is the published checkpoint, byte for byte")


if __name__ == "__main__":
    main()
