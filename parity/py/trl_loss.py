"""TRL's own dr_grpo loss, run on given log-probs.

GRPOTrainer._compute_loss is called unbound on a stand-in that answers what the
method asks of its trainer; the loss arithmetic is TRL's, in float64.
"""

import collections
import json
import types

import torch
from trl import GRPOTrainer

import objective


def trainer(logps, max_completion):
    """What _compute_loss reads of self, with the log-probs given."""
    same = lambda x, *a, **k: x
    return types.SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (logps, torch.zeros_like(logps), None),
        args=types.SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        accelerator=types.SimpleNamespace(gather=same, reduce=same, gather_for_metrics=same, num_processes=1, sync_gradients=True),
        model=types.SimpleNamespace(training=True),
        _metrics=collections.defaultdict(lambda: collections.defaultdict(list)),
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None, importance_sampling_level="token", beta=0.0, loss_type="dr_grpo",
        epsilon_low=objective.EPS_LOW, epsilon_high=objective.EPS_HIGH, use_vllm=False, vllm_importance_sampling_correction=False, _entropy_bonus_enabled=False,
        max_completion_length=max_completion, current_gradient_accumulation_steps=1)


def pad(rows, fill=0.0, dtype=torch.float64):
    width = max(len(r) for r in rows)
    return torch.tensor([list(r) + [fill] * (width - len(r)) for r in rows], dtype=dtype)


def compute(logps, old, mask, advantages, max_completion):
    inputs = {"prompt_ids": torch.zeros(len(logps), 1, dtype=torch.long), "prompt_mask": torch.ones(len(logps), 1), "completion_ids": torch.zeros_like(logps, dtype=torch.long),
              "completion_mask": mask, "advantages": advantages, "old_per_token_logps": old}
    return GRPOTrainer._compute_loss(trainer(logps, max_completion), None, inputs)


def flatten(groups):
    """Rows of all groups, with scale_rewards="none" advantages (reward - group mean)."""
    old, mask, adv = [], [], []
    for g in groups:
        mean = sum(c["reward"] for c in g["completions"]) / len(g["completions"])
        for c in g["completions"]:
            old.append(c["old"])
            mask.append([1.0 if m else 0.0 for m in c.get("mask", [True] * len(c["old"]))])
            adv.append(c["reward"] - mean)
    return pad(old), pad(mask), torch.tensor(adv, dtype=torch.float64)


def dr_grpo(model, groups, max_completion):
    """TRL's loss of the groups under a model."""
    with torch.no_grad():
        logps = pad([objective.log_probs(model, g["prompt"], c["tokens"]).tolist() for g in groups for c in g["completions"]])
        return compute(logps, *flatten(groups), max_completion).item()


def main(out):
    """parity/testdata/trl_dr_grpo.json: log-probs in, TRL's loss and d loss / d log-prob out."""
    g = torch.Generator().manual_seed(7)
    groups = []
    for lengths in ([5, 9, 1, 16, 7, 3, 12], [4, 8, 2, 11, 6, 10, 1]):
        group = {"prompt": [0], "completions": []}
        for n in lengths:
            # Values are float32 numbers, so that both sides start from the same.
            lp = (-3 * torch.rand(n, generator=g)).float()
            old = (lp + 0.3 * torch.randn(n, generator=g)).float()
            group["completions"].append({"logprobs": lp.double().tolist(), "old": old.double().tolist(), "reward": round(torch.randn((), generator=g).item(), 3)})
        groups.append(group)
    groups[0]["completions"][1]["mask"] = [i % 3 != 1 for i in range(9)]
    rows = [c for gr in groups for c in gr["completions"]]
    logps = pad([c["logprobs"] for c in rows]).requires_grad_()
    loss = compute(logps, *flatten(groups), 16)
    loss.backward()
    for c, d in zip(rows, logps.grad.tolist()):
        c["dlogp"] = d[: len(c["logprobs"])]
    import trl

    (out / "trl_dr_grpo.json").write_text(json.dumps({"groups": groups, "max_completion_tokens": 16, "loss": loss.item(), "made_with": {"trl": trl.__version__}}) + "\n")
