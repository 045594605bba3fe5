"""Goldens of small random Qwen2, Qwen3 and Llama decoders: parity/testdata/<case>/

  config.json, model.safetensors  the model, float32
  gradient/                       d loss / d parameter by float64 autograd, as a model directory (float32)
  golden.json                     groups, log-probs in float32 and float64, the loss, ten AdamW steps, TRL's dr_grpo loss
"""

import json

import numpy as np
import torch
import transformers
from safetensors.torch import save_file

import objective
import trl_loss

# hd*H != d for qwen3, so that no reader can take one for the other.
CASES = {
    "qwen2-tied": dict(type="qwen2", kv=2, tied=True),
    "qwen2-untied": dict(type="qwen2", kv=1, tied=False),
    "qwen3-tied": dict(type="qwen3", kv=2, tied=True, hd=16),
    "qwen3-untied": dict(type="qwen3", kv=4, tied=False, hd=12),
    "llama-tied": dict(type="llama", kv=2, tied=True),
    "llama-untied": dict(type="llama", kv=1, tied=False),
}
PROMPTS = [5, 14, 9]
COMPLETIONS = [[7, 1, 12, 4], [3, 9, 2, 11], [6, 5, 8, 1]]
STEPS = 10
# A decay large enough that ten steps without it miss the losses' tolerance.
ADAMW = dict(lr=1e-4, betas=[0.9, 0.95], eps=1e-8, weight_decay=0.2, max_grad_norm=1.0)
MAX_COMPLETION = 16  # dr_grpo's denominator


def build(case, seed):
    c = CASES[case]
    kind = {"qwen2": "Qwen2", "qwen3": "Qwen3", "llama": "Llama"}[c["type"]]
    extra = {"head_dim": c["hd"]} if "hd" in c else {}
    config = getattr(transformers, kind + "Config")(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=c["kv"], max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, rms_norm_eps=1e-6, tie_word_embeddings=c["tied"], bos_token_id=1, eos_token_id=2, pad_token_id=None,
        attn_implementation="eager", **extra)
    torch.manual_seed(seed)
    model = getattr(transformers, kind + "ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("norm.weight"):
                p.copy_(1 + 0.2 * torch.randn_like(p))
            elif "embed_tokens" in name or "lm_head" in name:
                p.copy_(0.5 * torch.randn_like(p))
            else:
                p.copy_(0.25 * torch.randn_like(p))
    return model


def make_groups(rng):
    groups = []
    for n, lengths in zip(PROMPTS, COMPLETIONS):
        prompt = rng.integers(0, 64, n).tolist()
        groups.append({"prompt": prompt, "completions": [{"tokens": rng.integers(0, 64, m).tolist(), "reward": float(np.round(0.2 * m + 0.3 * rng.normal(), 3))} for m in lengths]})
    for c in groups[2]["completions"]:  # a group without signal stays in the denominators
        c["reward"] = 0.5
    groups[0]["completions"][2]["mask"] = [i not in (3, 4) for i in range(12)]  # tokens the policy did not write
    return groups


def add_log_probs(model32, model64, groups, rng, noise):
    with torch.no_grad():
        for g in groups:
            for c in g["completions"]:
                c["logprobs32"] = objective.log_probs(model32, g["prompt"], c["tokens"]).double().tolist()
                lp = objective.log_probs(model64, g["prompt"], c["tokens"])
                c["logprobs64"] = lp.tolist()
                # The old policy is a float32 column: what is stored is exact there.
                old = (lp.numpy() + noise * rng.standard_normal(len(lp))).astype(np.float32)
                c["old"] = old.astype(np.float64).tolist()


def train(model, groups):
    """STEPS AdamW steps on the same groups with the old policy fixed; the loss before each."""
    decay = [p for n, p in model.named_parameters() if p.dim() > 1]
    plain = [p for n, p in model.named_parameters() if p.dim() == 1]
    opt = torch.optim.AdamW([{"params": decay, "weight_decay": ADAMW["weight_decay"]}, {"params": plain, "weight_decay": 0.0}], lr=ADAMW["lr"], betas=ADAMW["betas"], eps=ADAMW["eps"])
    losses, norms = [], []
    for _ in range(STEPS):
        opt.zero_grad()
        loss = objective.loss(model, groups)
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), ADAMW["max_grad_norm"]).item())
        opt.step()
        losses.append(loss.item())
    return losses, norms


def copy64(model):
    m = type(model)(model.config).double().eval()
    m.load_state_dict({k: v.double() for k, v in model.state_dict().items()})
    return m


def main(out):
    torch.set_num_threads(1)  # tiny shapes: a second thread only waits
    for n, case in enumerate(CASES):
        model = build(case, 100 + n)
        m64 = copy64(model)
        # The first seed whose old policy puts tokens beyond both bounds.
        for seed in range(1000 * n, 1000 * n + 50):
            rng = np.random.default_rng(seed)
            groups = make_groups(rng)
            add_log_probs(model, m64, groups, rng, 0.5)
            low, high = objective.clip_sides(m64, groups)
            if low >= 3 and high >= 3:
                break
        spread = np.concatenate([c["logprobs64"] for g in groups for c in g["completions"]])
        spread = float(spread.max() - spread.min())
        assert spread >= 3 and low >= 3 and high >= 3, (case, spread, low, high)

        loss = objective.loss(m64, groups)
        loss.backward()
        d = out / case
        model.save_pretrained(d)
        (d / "gradient").mkdir(exist_ok=True)
        grads = {name: p.grad.float().contiguous() for name, p in m64.named_parameters()}
        save_file(grads, d / "gradient" / "model.safetensors", metadata={"format": "pt"})
        (d / "gradient" / "config.json").write_text((d / "config.json").read_text())

        trl = trl_loss.dr_grpo(m64, groups, MAX_COMPLETION)
        losses, norms = train(copy64(model), groups)
        assert min(norms) > 0.1, (case, "every token is clipped and nothing is learned", norms)
        losses32, _ = train(model, groups)
        drift = max(abs(a - b) / abs(b) for a, b in zip(losses32, losses))
        assert drift < 5e-6, (case, "float32 PyTorch itself strays", drift)
        golden = {"groups": groups, "loss": loss.item(), "adamw": ADAMW, "losses": losses, "grad_norms": norms, "max_completion_tokens": MAX_COMPLETION, "trl_dr_grpo_loss": trl,
                  "made_with": {"torch": torch.__version__, "transformers": transformers.__version__}}
        (d / "golden.json").write_text(json.dumps(golden) + "\n")
        print(f"{case}: spread {spread:.1f} nats, clipped low {low} high {high}, losses {losses[0]:.4f} to {losses[-1]:.4f}, float32 drift {drift:.1e}")
