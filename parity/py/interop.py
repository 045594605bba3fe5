"""The checks of parity/interop.sh: interop.py TRAINERD URL STORE IMPORTED

For each architecture: a job over HTTP, a rollout batch from pyarrow, a
checkpoint, which `trainerd pull` fetches whole and `trainerd pull --delta` as
what changed since the one before; transformers loads what both delivered and
scores the same rows as POST .../logprobs. Then what `trainerd import` made of
SmolLM2's GGUF.
"""

import json
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
import pyarrow as pa
import requests
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

import objective

ARROW = "application/vnd.apache.arrow.stream"
TOLERANCE = 1e-4
CASES = ["qwen2-untied", "qwen3-tied", "llama-tied"]
TESTDATA = pathlib.Path(__file__).resolve().parent.parent / "testdata"
WAIT = 120  # seconds


def stream(columns):
    table = pa.table(columns)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as w:
        w.write_table(table)
    return sink.getvalue().to_pybytes()


def call(method, url, **kw):
    r = requests.request(method, url, timeout=WAIT, **kw)
    assert r.ok, (method, url, r.status_code, r.text)
    return r


def tokens(rows):
    return pa.array(rows, pa.list_(pa.int32()))


def pull(trainerd, url, job, step, to, *more):
    """What `trainerd pull` prints when it brings a step into a directory."""
    return subprocess.run([trainerd, "pull", "--server", url, "--step", str(step), *more, job, str(to)], check=True, capture_output=True, text=True).stdout


def check(trainerd, url, store, case, tmp):
    groups = json.loads((TESTDATA / case / "golden.json").read_text())["groups"]
    rows = [(f"g{i}", g["prompt"], c["tokens"], c["reward"], c["old"]) for i, g in enumerate(groups) for c in g["completions"]]
    ids, prompts, completions, rewards, old = map(list, zip(*rows))
    job = call("POST", f"{url}/v1/jobs", json={"name": case, "model": {"source": f"dir:{TESTDATA / case}"}, "objective": {"group_size": len(groups[0]["completions"])},
                                               "optimizer": {"lr": 1e-3}, "batch": {"groups_per_step": len(groups)}, "max_steps": 100}).json()
    base = f"{url}/v1/jobs/{job['id']}"
    body = stream({"group_id": ids, "prompt_tokens": tokens(prompts), "completion_tokens": tokens(completions), "reward": rewards, "sampler_logprobs": pa.array(old, pa.list_(pa.float32()))})
    assert call("POST", f"{base}/rollouts", data=body, headers={"Content-Type": ARROW}).status_code == 202
    latest = call("GET", f"{base}/checkpoints/latest", params={"after": 0, "wait": f"{WAIT - 10}s"}).json()
    assert latest["step"] == 1, latest
    published = store / latest["prefix"] / "hf"
    whole, changed = tmp / case / "whole", tmp / case / "changed"
    pull(trainerd, url, job["id"], 1, whole)
    pull(trainerd, url, job["id"], 0, changed)
    out = pull(trainerd, url, job["id"], 1, changed, "--delta")
    assert "whole files of 0;" in out, out
    for d in (whole, changed):
        names = {p.name for p in d.iterdir()} - {".trainerd.json"}
        assert names == {p.name for p in published.iterdir()}, names
        for name in names:
            assert (d / name).read_bytes() == (published / name).read_bytes(), (d, name)

    r = call("POST", f"{base}/logprobs", data=stream({"prompt_tokens": tokens(prompts), "completion_tokens": tokens(completions)}), headers={"Content-Type": ARROW, "Accept": ARROW})
    assert r.headers["Trainerd-Policy-Step"] == "1", r.headers
    served = pa.ipc.open_stream(r.content).read_all().to_pydict()
    assert served["completion_tokens"] == completions

    before = AutoModelForCausalLM.from_pretrained(TESTDATA / case, dtype=torch.float32)
    worst = moved = 0.0
    for d in (whole, changed):
        model, info = AutoModelForCausalLM.from_pretrained(d, dtype=torch.float32, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"], info
        with torch.no_grad():
            for p, c, got in zip(prompts, completions, served["logprobs"]):
                want = objective.log_probs(model.eval(), p, c).numpy()
                worst = max(worst, float(np.abs(want - np.array(got)).max()))
                moved = max(moved, float(np.abs(want - objective.log_probs(before.eval(), p, c).numpy()).max()))
    print(f"{case}: {sum(map(len, completions))} log-probs of the served policy within {worst:.1e} of transformers on what pull and pull --delta delivered; the step moved them by up to {moved:.2f}")
    assert worst <= TOLERANCE, worst
    assert moved > 100 * TOLERANCE, "the checkpoint is the model it started from"


def check_import(d):
    """SmolLM2's GGUF after `trainerd import`: tokenizer, chat template and weights, as transformers reads them."""
    golden = json.loads((TESTDATA / "smollm2_tokenizer.json").read_text())
    fast, auto = Tokenizer.from_file(str(d / "tokenizer.json")), AutoTokenizer.from_pretrained(d)
    for text, ids in zip(golden["texts"], golden["ids"]):
        assert fast.encode(text).ids == ids, ("tokenizers", text)
        assert auto.encode(text) == ids, ("transformers", text)
    chat = auto.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True)
    assert chat.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"), chat
    assert (auto.eos_token, auto.bos_token) == ("<|im_end|>", "<|im_start|>")
    model, info = AutoModelForCausalLM.from_pretrained(d, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    assert model.generation_config.eos_token_id == auto.eos_token_id
    worst = 0.0
    with torch.no_grad():
        for g in json.loads((TESTDATA / "smollm2.json").read_text())["groups"]:
            for c in g["completions"]:
                got = objective.log_probs(model.eval(), g["prompt"], c["tokens"]).double().numpy()
                worst = max(worst, float(np.abs(got - np.array(c["logprobs32"])).max()))
    print(f"smollm2 import: {len(golden['texts'])} texts tokenize the same; log-probs within {worst:.1e} of the independent reader's")
    assert worst <= TOLERANCE, worst


def main():
    trainerd, url, store, imported = sys.argv[1], sys.argv[2], pathlib.Path(sys.argv[3]), pathlib.Path(sys.argv[4])
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as tmp:
        for case in CASES:
            check(trainerd, url, store, case, pathlib.Path(tmp))
    check_import(imported)
    print("interop: ok")


if __name__ == "__main__":
    main()
