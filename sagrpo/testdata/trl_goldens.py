"""Writes trl.json: losses and gradients of TRL's own GRPOTrainer._compute_loss,
in float64, given log-probs instead of a model. Run by hand where torch and trl
are installed:

    "${XDG_CACHE_HOME:-$HOME/.cache}/trainerd/venv/bin/python" sagrpo/testdata/trl_goldens.py

Advantages follow TRL's scale_rewards: "none" is R - mean, "group" divides by the
sample standard deviation + 1e-4.
"""

import collections
import json
import pathlib
import types

import torch
import trl
from trl import GRPOTrainer

torch.manual_seed(20251209)
Q, G, T = 4, 6, 7
B = Q * G
lengths = torch.randint(1, T + 1, (B,))
present = torch.arange(T)[None, :] < lengths[:, None]
mask = present & (torch.rand(B, T) > 0.2)
mask[:, 0] = True  # TRL divides by a sequence's active tokens
# Values are float32 numbers, so that both sides start from the same.
f32 = lambda x: x.float().double()
logp = f32(-0.1 - 3 * torch.rand(B, T, dtype=torch.float64))
noise = torch.tensor([2e-4, 0.15, 0.3, 0.8], dtype=torch.float64)[torch.randint(0, 4, (B, 1))]
old = f32(logp + noise * torch.randn(B, T, dtype=torch.float64))
ref = f32(logp + 0.3 * torch.randn(B, T, dtype=torch.float64))
sampler = f32(old + 0.5 * torch.randn(B, T, dtype=torch.float64))
rewards = torch.rand(B, dtype=torch.float64)

CASES = [  # name, TRL's loss_type, sequence level, scale, eps_low, eps_high, delta, beta, tis_cap
    ("dr_grpo", "dr_grpo", False, "none", 0.2, 0.28, None, 0.0, 0.0),
    ("dr_grpo", "dr_grpo", False, "none", 0.2, 0.2, 1.5, 0.04, 0.0),
    ("grpo", "grpo", False, "group", 0.2, 0.2, None, 0.04, 0.0),
    ("grpo", "grpo", False, "group", 0.2, 0.28, 1.4, 0.0, 1.2),
    ("dapo", "dapo", False, "group", 0.2, 0.28, None, 0.0, 0.0),
    ("bnpo", "bnpo", False, "group", 0.2, 0.28, None, 0.1, 0.0),
    ("gspo", "grpo", True, "group", 3e-4, 4e-4, None, 0.0, 0.0),
    ("gspo", "grpo", True, "group", 0.1, 0.2, None, 0.05, 2.0),
    ("cispo", "cispo", False, "group", 0.2, 1.5, None, 0.0, 0.0),
    ("cispo", "cispo", False, "group", 0.2, 5.0, None, 0.04, 1.2),
]


def run(loss_type, sequence, scale, eps_low, eps_high, delta, beta, cap):
    grouped = rewards.view(Q, G)
    adv = grouped - grouped.mean(1, keepdim=True)
    if scale == "group":
        adv = adv / (grouped.std(1, keepdim=True) + 1e-4)
    theta = logp.clone().requires_grad_(True)
    same = lambda x, **kw: x
    stub = types.SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **kw: (theta, torch.zeros_like(theta), None),
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None,
        importance_sampling_level="sequence" if sequence else "token", beta=beta, loss_type=loss_type,
        epsilon_low=eps_low, epsilon_high=eps_high, use_vllm=cap > 0, vllm_importance_sampling_correction=cap > 0,
        args=types.SimpleNamespace(delta=delta, use_bias_correction_kl=False, steps_per_generation=1),
        model=types.SimpleNamespace(training=True), current_gradient_accumulation_steps=1, max_completion_length=8,
        accelerator=types.SimpleNamespace(num_processes=1, gather=same, gather_for_metrics=same, reduce=same, sync_gradients=True),
        _entropy_bonus_enabled=False, _metrics={"train": collections.defaultdict(list)},
    )
    m = mask.double()
    inputs = dict(
        prompt_ids=torch.zeros(B, 1, dtype=torch.long), prompt_mask=torch.ones(B, 1, dtype=torch.long),
        completion_ids=torch.zeros(B, T, dtype=torch.long), completion_mask=m,
        advantages=adv.reshape(-1), old_per_token_logps=old, ref_per_token_logps=ref,
        num_items_in_batch=m.sum(), importance_sampling_ratio=torch.exp(old - sampler).clamp(max=cap if cap > 0 else 1.0),
    )
    loss = GRPOTrainer._compute_loss(stub, None, inputs)
    loss.backward()
    clip = {k: v[-1] for k, v in stub._metrics["train"].items() if k.startswith("clip_ratio/") and k.endswith("_mean")}
    return loss.item(), theta.grad, clip


rows = lambda x: [x[b, : lengths[b]].tolist() for b in range(B)]
out = {
    "trl": trl.__version__, "group_size": G, "max_completion_tokens": 8, "rewards": rewards.tolist(),
    "logp": rows(logp), "old": rows(old), "ref": rows(ref), "sampler": rows(sampler), "mask": rows(mask), "cases": [],
}
for name, loss_type, sequence, scale, lo, hi, delta, beta, cap in CASES:
    loss, grad, clip = run(loss_type, sequence, scale, lo, hi, delta, beta, cap)
    out["cases"].append({
        "objective": name, "epsilon_low": lo, "epsilon_high": hi, "delta": delta or 0, "beta": beta, "tis_cap": cap,
        "loss": loss, "grad": rows(grad), "clip": clip,
    })
path = pathlib.Path(__file__).with_name("trl.json")
path.write_text(json.dumps(out) + "\n")
print(path, path.stat().st_size, "bytes")
