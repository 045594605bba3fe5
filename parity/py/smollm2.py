"""Goldens of SmolLM2-135M-Instruct, read from the GGUF by the gguf package and not by our import.

  smollm2.json            groups of token ids with log-probs in float32, and for every parameter
                          the norm and 16 random +-1 projections of the float64 gradient of the loss
  smollm2_tokenizer.json  ids of the corpus, by a tokenizer assembled here from the metadata

A gradient of 135M numbers is not stored. With s_k a vector of random signs,
E[(s_k . (g - r))^2] = |g - r|^2, so 16 projections of r let a test estimate the
distance of any g; the mean of 16 squares has a relative deviation of about sqrt(2/16).

Sign k of element i (row-major, Hugging Face layout) of tensor "name" is bit k of
splitmix64(fnv1a64(name) + (i+1) * 0x9E3779B97F4A7C15): 1 is +, 0 is -.
"""

import json

import gguf
import numpy as np
import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

import corpus
import objective

PROJECTIONS = 16
NAMES = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
         "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}

PROMPTS = ["<|im_start|>user\nAlert: 14 connection attempts from 198.51.100.23 to redis:6379, risk HIGH. Answer with a JSON list of tool calls.<|im_end|>\n<|im_start|>assistant\n",
           "<|im_start|>user\nIDS: SQL injection against /login from 203.0.113.7. Tools: block_ip, patch_vulnerabilities.<|im_end|>\n<|im_start|>assistant\n"]
COMPLETIONS = [['[{"tool":"block_ip","params":{"ip":"198.51.100.23"}}]<|im_end|>', "I would block the address first.", '[{"tool":"harden_kernel"}]<|im_end|>'],
               ['[{"tool":"patch_vulnerabilities"}]<|im_end|>', '[{"tool":"block_ip","params":{"ip":"203.0', "SQL"]]
REWARDS = [[1.9, -0.4, 0.3], [1.2, 0.9, -1.0]]


def fields(reader):
    return {k: f.contents() for k, f in reader.fields.items()}


def tokenizer(meta):
    tokens, types = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    t = Tokenizer(models.BPE({x: i for i, x in enumerate(tokens)}, [tuple(m.split(" ")) for m in meta["tokenizer.ggml.merges"]]))
    assert meta["tokenizer.ggml.pre"] == "smollm"
    t.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    t.decoder = decoders.ByteLevel()
    t.add_special_tokens([AddedToken(x, special=True, normalized=False) for x, kind in zip(tokens, types) if kind == 3])
    return t


def build(reader, meta):
    heads, kv = meta["llama.attention.head_count"], meta["llama.attention.head_count_kv"]
    config = transformers.LlamaConfig(
        vocab_size=49152, hidden_size=meta["llama.embedding_length"], intermediate_size=meta["llama.feed_forward_length"], num_hidden_layers=meta["llama.block_count"],
        num_attention_heads=heads, num_key_value_heads=kv, max_position_embeddings=meta["llama.context_length"], rms_norm_eps=1e-5, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": meta["llama.rope.freq_base"]}, attn_implementation="eager")
    state = {}
    for t in reader.tensors:
        x = np.ascontiguousarray(gguf.quants.dequantize(t.data, t.tensor_type)).astype(np.float32)
        part = t.name.split(".")
        if part[0] == "blk":
            if part[2] in ("attn_q", "attn_k"):  # undo llama.cpp's interleaving of each head's halves
                n = heads if part[2] == "attn_q" else kv
                x = x.reshape(n, x.shape[0] // n // 2, 2, -1).swapaxes(1, 2).reshape(x.shape)
            name = f"model.layers.{part[1]}.{NAMES[part[2]]}.weight"
        else:
            name = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}[t.name]
        state[name] = torch.from_numpy(x.copy())
    model = transformers.LlamaForCausalLM(config).eval()
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and missing == ["lm_head.weight"], (missing, unexpected)
    model.tie_weights()
    return model


def signs(name, start, count):
    """The hash words of elements [start, start+count)."""
    h = 0xCBF29CE484222325
    for b in name.encode():
        h = (h ^ b) * 0x100000001B3 % 2**64
    i = np.arange(start + 1, start + count + 1, dtype=np.uint64)
    z = np.uint64(h) + i * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def project(name, g):
    out = np.zeros(PROJECTIONS)
    g = g.reshape(-1)
    for start in range(0, len(g), 1 << 20):
        part = g[start : start + (1 << 20)]
        z = signs(name, start, len(part))
        total = part.sum()
        for k in range(PROJECTIONS):
            out[k] += 2 * part[(z >> np.uint64(k)) & np.uint64(1) == 1].sum() - total
    return out.tolist()


def main(out, path):
    torch.set_num_threads(2)
    reader = gguf.GGUFReader(path)
    meta = fields(reader)
    tok = tokenizer(meta)
    texts = corpus.texts()
    (out / "smollm2_tokenizer.json").write_text(json.dumps({"texts": texts, "ids": [tok.encode(x).ids for x in texts]}, separators=(",", ":")) + "\n")

    model = build(reader, meta)
    groups = [{"prompt": tok.encode(p).ids, "prompt_text": p, "completions": [{"text": c, "tokens": tok.encode(c).ids[:18], "reward": r} for c, r in zip(cs, rs)]}
              for p, cs, rs in zip(PROMPTS, COMPLETIONS, REWARDS)]
    rng = np.random.default_rng(135)
    with torch.no_grad():
        for g in groups:
            for c in g["completions"]:
                c["logprobs32"] = objective.log_probs(model, g["prompt"], c["tokens"]).double().tolist()
    model = model.double()
    with torch.no_grad():
        for g in groups:
            for c in g["completions"]:
                lp = objective.log_probs(model, g["prompt"], c["tokens"])
                c["logprobs64"] = lp.tolist()
                c["old"] = (lp.numpy() + 0.3 * rng.standard_normal(len(lp))).astype(np.float32).astype(np.float64).tolist()
    both = [(a, b) for g in groups for c in g["completions"] for a, b in zip(c["logprobs32"], c["logprobs64"])]
    spread = max(b for _, b in both) - min(b for _, b in both)
    low, high = objective.clip_sides(model, groups)
    assert spread >= 3 and low and high, (spread, low, high)

    loss = objective.loss(model, groups)
    loss.backward()
    params = {}
    for name, p in model.named_parameters():
        g = p.grad.numpy()
        params[name] = {"norm": float(np.sqrt((g.astype(np.float64) ** 2).sum())), "projections": project(name, g)}
    golden = {"groups": groups, "loss": loss.item(), "parameters": params, "made_with": {"torch": torch.__version__, "transformers": transformers.__version__, "gguf": "0.19.0"}}
    (out / "smollm2.json").write_text(json.dumps(golden) + "\n")
    print(f"smollm2: {len(both)} tokens, prompts {[len(g['prompt']) for g in groups]}, spread {spread:.1f} nats, float32 against float64 {max(abs(a - b) for a, b in both):.1e}, loss {loss.item():.4f}, clipped {low} and {high}")
