"""The SA-GRPO loss in PyTorch, written from the algorithm and from nothing of ours.

Every completion runs on its own behind its prompt: no packing, no padding, no
shared prefix. L = -1/(G*Q) * sum over tokens of min(g*A, clip(g, 1-lo, 1+hi)*A).
"""

import torch

EPS_LOW, EPS_HIGH = 0.2, 0.28


def log_probs(model, prompt, completion):
    """The completion's per-token log-probs, in the model's own precision."""
    ids = torch.tensor([prompt + completion])
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits, -1).gather(1, torch.tensor(completion)[:, None])[:, 0]


def loss(model, groups):
    """The loss of one step over all groups; old log-probs and rewards are in the groups."""
    total = 0.0
    for g in groups:
        rewards = torch.tensor([c["reward"] for c in g["completions"]], dtype=torch.float64)
        advantages = rewards - rewards.mean()
        for c, a in zip(g["completions"], advantages.to(next(model.parameters()).dtype)):
            logp = log_probs(model, g["prompt"], c["tokens"])
            ratio = torch.exp(logp - torch.tensor(c["old"], dtype=torch.float64).to(logp.dtype))
            clipped = torch.clamp(ratio, 1 - EPS_LOW, 1 + EPS_HIGH)
            token = torch.minimum(ratio * a, clipped * a)
            mask = torch.tensor(c.get("mask", [True] * len(c["tokens"])))
            total = total - torch.where(mask, token, 0.0).sum() / (len(g["completions"]) * len(groups))
    return total


def clip_sides(model, groups):
    """How many tokens each bound holds back: (low, high)."""
    low = high = 0
    with torch.no_grad():
        for g in groups:
            mean = sum(c["reward"] for c in g["completions"]) / len(g["completions"])
            for c in g["completions"]:
                ratio = torch.exp(log_probs(model, g["prompt"], c["tokens"]) - torch.tensor(c["old"], dtype=torch.float64))
                a = c["reward"] - mean
                low += int(((ratio < 1 - EPS_LOW) & (a < 0)).sum())
                high += int(((ratio > 1 + EPS_HIGH) & (a > 0)).sum())
    return low, high
