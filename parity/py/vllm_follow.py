"""The check of parity/vllm.sh: vllm_follow.py TRAINERD VLLM URL DIR

A job on SmolLM2-135M in float32 publishes step 1; `trainerd pull` fetches it and
vLLM serves it; vLLM's log-probs of the trained rows are compared with POST
.../logprobs. Then the follower runs with deploy/inference/vllm.py, a second step
is trained, the server hears that the node serves it, and vLLM, which was not
started again, is compared with the new policy. vLLM 0.32 on the CPU fails that: it keeps
the output layer of a model with tied embeddings (docs/checkpoints.md).
"""

import os
import pathlib
import socket
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import requests
from tokenizers import Tokenizer

from interop import ARROW, call, pull, stream, tokens

# Both evaluate 30 layers in float32 and add up in another order. transformers is
# within 1e-4 on this model (parity/interop.sh); vLLM's kernels get ten times that.
TOLERANCE = 1e-3
ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
ROWS = [("The capital of France is", " Paris, and it lies on the Seine.", 1.0), ("The capital of France is", " not known to me.", 0.0),
        ("Water boils when", " it is hot enough: at 100 degrees.", 1.0), ("Water boils when", " you look at it.", 0.0)]
START = 1200  # seconds that vLLM may take to start


def wait(what, cond, seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        got = cond()
        if got:
            return got
        time.sleep(0.5)
    raise AssertionError(f"{what}: not within {seconds} s")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def scores(engine, model, prompt, completion):
    """vLLM's log-probs of a completion, as part of a prompt."""
    r = call("POST", f"{engine}/v1/completions", json={"model": model, "prompt": prompt + completion, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}).json()
    rows = r["choices"][0]["prompt_logprobs"]
    return [rows[len(prompt) + i][str(t)]["logprob"] for i, t in enumerate(completion)]


def main():
    trainerd, vllm, url, root = sys.argv[1], sys.argv[2], sys.argv[3], pathlib.Path(sys.argv[4])
    text = Tokenizer.from_file(str(root / "smollm2" / "tokenizer.json"))
    prompts, completions = [text.encode(p).ids for p, _, _ in ROWS], [text.encode(c).ids for _, c, _ in ROWS]
    job = call("POST", f"{url}/v1/jobs", json={"model": {"source": f"dir:{root / 'smollm2'}"}, "objective": {"group_size": 2}, "optimizer": {"lr": 1e-4},
               "batch": {"groups_per_step": 2, "max_tokens_per_micro_batch": 256}, "checkpoint": {"dtype": "F32", "keep_last": 2, "snapshot_every_steps": 0},
               "sampling": {"max_sequences": 0}, "max_steps": 2}).json()
    base = f"{url}/v1/jobs/{job['id']}"

    def train(step):
        body = stream({"group_id": [f"s{step}-{i // 2}" for i in range(len(ROWS))], "prompt_tokens": tokens(prompts), "completion_tokens": tokens(completions), "reward": [r for *_, r in ROWS]})
        call("POST", f"{base}/rollouts", data=body, headers={"Content-Type": ARROW})
        wait(f"step {step}", lambda: call("GET", base).json()["policy_step"] == step, 600)

    def served(step):
        r = call("POST", f"{base}/logprobs", data=stream({"prompt_tokens": tokens(prompts), "completion_tokens": tokens(completions)}), headers={"Content-Type": ARROW, "Accept": ARROW})
        assert r.headers["Trainerd-Policy-Step"] == str(step), r.headers
        return pa.ipc.open_stream(r.content).read_all().to_pydict()["logprobs"]

    wait("step 0", lambda: call("GET", base).json()["policy_step"] == 0, 600)
    train(1)
    policy = root / "policy"
    pull(trainerd, url, job["id"], 1, policy)
    port = free_port()
    engine = f"http://127.0.0.1:{port}"
    log = open(root / "vllm.log", "w")
    env = os.environ | {"VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    server = subprocess.Popen([vllm, "serve", str(policy), "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", "256", "--enforce-eager"], env=env, stdout=log, stderr=log)
    follower = None
    try:
        def up():
            assert server.poll() is None, "vLLM ended"
            try:
                return requests.get(f"{engine}/health", timeout=5).ok
            except requests.RequestException:
                return False

        wait("vLLM", up, START)

        def compare(step):
            want = served(step)
            worst = max(float(np.abs(np.array(w) - np.array(scores(engine, str(policy), p, c))).max()) for w, p, c in zip(want, prompts, completions))
            print(f"step {step}: {sum(map(len, completions))} log-probs of vLLM within {worst:.1e} of POST .../logprobs")
            assert worst <= TOLERANCE, worst
            return want

        first = compare(1)
        follower = subprocess.Popen([trainerd, "pull", "--follow", "--delta", "--server", url, "--node", "vllm", "--report", "1s", "--exec", str(ROOT / "deploy/inference/vllm.py"), job["id"], str(policy), "--", engine], stderr=log)

        def node(step):
            assert follower.poll() is None, "the follower ended"
            return any(n["step"] == step and n["state"] == "serving" and n["matches"] for n in call("GET", f"{base}/nodes").json()["nodes"])

        wait("the node to serve step 1", lambda: node(1), 300)
        train(2)
        wait("the node to serve step 2", lambda: node(2), 600)
        second = compare(2)
        moved = max(float(np.abs(np.array(a) - np.array(b)).max()) for a, b in zip(first, second))
        print(f"the second step moved them by up to {moved:.2f}; vLLM took it by deploy/inference/vllm.py")
        assert moved > 10 * TOLERANCE, "the second policy is the first one"
    finally:
        for p in (follower, server):
            if p is not None:
                p.terminate()
                try:
                    p.wait(60)
                except subprocess.TimeoutExpired:
                    p.kill()
    print("vllm: ok")


if __name__ == "__main__":
    main()
