#!/usr/bin/env python3
"""Whole models on a device beside transformers: device_compare.py PROBE DEVICE MODEL [--steps N]

MODEL is a Hugging Face directory, or random-0.5b (made here from a seed). For one
batch of groups it compares, all against transformers in float32:

* log-probs: mean |ours - transformers bf16| at most 1.2 x mean |transformers bf16 - float32|
* gradients, per tensor: 1 - cosine at most 1.2 x that of transformers bf16 (tensors
  under 1e-3 of the global norm are listed and not judged)
* with --steps: the loss of N AdamW steps, device beside CPU device, within the
  largest distance of PyTorch bf16 (bf16 weights and moments) from float32

One JSON object per line; exits 1 when something is outside. --device cpu and
--float32 hold the CPU device to 1e-4 instead, which shows that the script can judge.
"""
import argparse, json, pathlib, subprocess, sys, tempfile

import numpy as np
import torch


def emit(name, **kv):
    print(json.dumps({"name": name, **kv}), flush=True)


def make_groups(vocab, prompts, lengths):
    r = np.random.default_rng(7)
    ids = lambda n: [int(x) for x in r.integers(0, vocab, n)]
    return [{"prompt": ids(p), "completions": [{"tokens": ids(n), "adv": float(r.normal())} for n in lengths]} for p in prompts]


def log_probs(model, prompt, completion):
    t = torch.tensor([prompt + completion], device=model.device)
    z = model(input_ids=t, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    return torch.log_softmax(z, -1).gather(1, t[0, len(prompt) :, None])[:, 0]


def total(model, groups):
    n = sum(len(c["tokens"]) for g in groups for c in g["completions"])
    out, loss = [], 0.0
    for g in groups:
        for c in g["completions"]:
            lp = log_probs(model, g["prompt"], c["tokens"])
            part = -(c["adv"] * lp).sum() / n
            part.backward()
            loss += part.item()
            out.append(lp.detach().float().cpu())
    return torch.cat(out).numpy().astype(np.float64), loss


def load(path, dtype, device):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device).train()


def reference(path, dtype, device, groups):
    m = load(path, dtype, device)
    lp, _ = total(m, groups)
    return lp, {n: p.grad.float().cpu().numpy().ravel() for n, p in m.named_parameters()}


def losses(path, dtype, device, groups, steps, lr):
    m = load(path, dtype, device)
    opt = torch.optim.AdamW(m.parameters(), lr=lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0)
    out = []
    for _ in range(steps):
        opt.zero_grad()
        out.append(total(m, groups)[1])
        torch.nn.utils.clip_grad_norm_(m.parameters(), 1.0)
        opt.step()
    return np.array(out)


def probe(binary, device, path, groups, work, *more):
    (work / "groups.json").write_text(json.dumps(groups))
    subprocess.run([binary, device, path, work / "groups.json", work / "out", *map(str, more)], check=True, timeout=300)
    flat, index = np.fromfile(work / "out.bin", np.float32), json.loads((work / "out.json").read_text())
    return {k: flat[a : a + n] for k, (a, n) in index.items()}


def cosine_gap(a, b):
    a, b = a.astype(np.float64), b.astype(np.float64)
    n = np.linalg.norm(a) * np.linalg.norm(b)
    return 1.0 - float(a @ b / n) if n > 0 else float(np.linalg.norm(a) + np.linalg.norm(b) > 0)


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("probe")
    ap.add_argument("device")
    ap.add_argument("model")
    ap.add_argument("--steps", type=int, default=0)
    ap.add_argument("--lr", type=float, default=1e-5)
    ap.add_argument("--float32", action="store_true")
    ap.add_argument("--short", action="store_true")
    a = ap.parse_args()
    torch.manual_seed(0)
    card = a.device if a.device.startswith("cuda") else "cpu"
    ok = True
    with tempfile.TemporaryDirectory() as d:
        work, path, name = pathlib.Path(d), a.model, pathlib.Path(a.model).name
        if a.model == "random-0.5b":
            from transformers import Qwen2Config, Qwen2ForCausalLM

            cfg = Qwen2Config(hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True)
            path = str(work / "model")
            Qwen2ForCausalLM(cfg).to(torch.bfloat16).save_pretrained(path)
        vocab = json.loads((pathlib.Path(path) / "config.json").read_text())["vocab_size"]
        groups = make_groups(vocab, [20], [5, 1, 9]) if a.short else make_groups(vocab, [200, 77], [40, 65, 1, 130])
        lp32, g32 = reference(path, torch.float32, card, groups)
        lp16, g16 = reference(path, torch.bfloat16, card, groups)
        got = probe(a.probe, a.device, path, groups, work)
        ours = got["logprobs"].astype(np.float64)
        spread, mean = float(np.abs(lp16 - lp32).mean()), float(np.abs(ours - lp16).mean())
        if a.float32:
            worst = float(np.abs(ours - lp32).max())
            good = worst <= 1e-4
            emit("logprobs_float32", model=name, worst=worst, ok=good)
        else:
            good = mean <= 1.2 * spread
            emit("logprobs", model=name, tokens=len(ours), mean_from_bf16=mean, mean_from_float32=float(np.abs(ours - lp32).mean()), transformers_bf16_from_float32=spread, ok=good)
        ok &= good
        norm = float(np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in g32.values())))
        small, bad, worst = [], [], 0.0
        for k, want in g32.items():
            gap, bar = cosine_gap(want, got[k]), (1e-8 if a.float32 else 1.2 * cosine_gap(want, g16[k]))
            if np.linalg.norm(want.astype(np.float64)) < 1e-3 * norm:
                small.append([k, gap, bar])
            else:
                worst = max(worst, gap / bar if bar > 0 else float(gap > 0) * np.inf)
                if gap > bar:
                    bad.append([k, gap, bar])
        emit("gradients", model=name, tensors=len(g32), worst_share_of_bar=worst, over=sorted(bad, key=lambda x: -x[1])[:10], small=small[:10], smalls=len(small), ok=not bad)
        ok &= not bad
        if a.steps:
            here = probe(a.probe, a.device, path, groups, work, a.steps, a.lr)["losses"].astype(np.float64)
            cpu = probe(a.probe, "cpu", path, groups, work, a.steps, a.lr)["losses"].astype(np.float64)
            t32, t16 = (losses(path, t, card, groups, a.steps, a.lr) for t in (torch.float32, torch.bfloat16))
            off, bar = float(np.abs(here - cpu).max()), float(np.abs(t16 - t32).max())
            emit("steps", model=name, steps=a.steps, lr=a.lr, ours_from_cpu=off, torch_bf16_from_float32=bar, cpu_from_torch_float32=float(np.abs(cpu - t32).max()), first=float(cpu[0]), last=float(cpu[-1]), ok=off <= bar)
            ok &= off <= bar
    sys.exit(not ok)


if __name__ == "__main__":
    main()
