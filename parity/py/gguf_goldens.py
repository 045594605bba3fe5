"""Writes model/gguf/testdata: one small GGUF per architecture, and what
transformers' own GGUF reader makes of it (config, and a SHA-256 of each
tensor's float32 bytes: dequantisation is exact, so the bits must agree)."""

import hashlib
import json
import pathlib
import sys

import gguf
import numpy as np
import torch
import transformers
from gguf import GGMLQuantizationType as Q

CASES = {
    "llama": dict(hidden=32, ffn=64, heads=4, kv=2, hd=8, tied=True, eps=1e-5, theta=100000.0, pre="smollm",
                  types=dict(token_embd=Q.Q8_0, attn_q=Q.Q4_1, attn_k=Q.Q4_0, attn_v=Q.Q4_1, attn_output=Q.Q4_1, ffn_gate=Q.Q4_0, ffn_up=Q.Q4_1, ffn_down=Q.Q8_0)),
    "qwen2": dict(hidden=32, ffn=96, heads=4, kv=2, hd=8, tied=True, eps=1e-6, theta=1000000.0, pre="qwen2",
                  types=dict(token_embd=Q.F16, attn_q=Q.F16, attn_k=Q.F16, attn_v=Q.F16, attn_output=Q.F16, ffn_gate=Q.F16, ffn_up=Q.Q8_0, ffn_down=Q.F16)),
    "qwen3": dict(hidden=32, ffn=64, heads=2, kv=1, hd=32, tied=False, eps=1e-6, theta=1000000.0, pre="qwen2",
                  types=dict(token_embd=Q.BF16, output=Q.BF16, attn_q=Q.BF16, attn_k=Q.F32, attn_v=Q.BF16, attn_output=Q.BF16, ffn_gate=Q.BF16, ffn_up=Q.BF16, ffn_down=Q.BF16)),
}
LAYERS = 2


def interleave(w, heads):
    """llama.cpp's row order of q and k in the llama architecture."""
    return w.reshape(heads, 2, w.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(w.shape)


def write(path, arch, c, tokenizer, rng):
    w = gguf.GGUFWriter(path, arch)
    w.add_context_length(512)
    w.add_embedding_length(c["hidden"])
    w.add_feed_forward_length(c["ffn"])
    w.add_block_count(LAYERS)
    w.add_head_count(c["heads"])
    w.add_head_count_kv(c["kv"])
    w.add_layer_norm_rms_eps(c["eps"])
    w.add_rope_freq_base(c["theta"])
    if c["hd"] != c["hidden"] // c["heads"]:
        w.add_key_length(c["hd"])
        w.add_value_length(c["hd"])
    vocab = sorted(tokenizer["model"]["vocab"].items(), key=lambda kv: kv[1])
    added = {a["content"]: a for a in tokenizer["added_tokens"]}
    tokens = [t for t, _ in vocab] + [a["content"] for a in sorted(added.values(), key=lambda a: a["id"]) if a["id"] >= len(vocab)]
    types = [gguf.TokenType.NORMAL if t not in added else gguf.TokenType.CONTROL if added[t]["special"] else gguf.TokenType.USER_DEFINED for t in tokens]
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre(c["pre"])
    w.add_token_list(tokens)
    w.add_token_types(types)
    w.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"]["merges"]])
    w.add_bos_token_id(1)
    w.add_eos_token_id(2)
    w.add_pad_token_id(2)
    w.add_chat_template("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' }}{% endfor %}")

    original = {}

    def add(name, *shape, norm=False):
        x = (1 + 0.1 * rng.standard_normal(shape) if norm else 0.3 * rng.standard_normal(shape)).astype(np.float32)
        original[name] = x
        kind = c["types"].get(name.split(".")[-2], Q.F32) if name.endswith(".weight") and len(shape) == 2 else Q.F32
        if arch == "llama" and (".attn_q." in name or ".attn_k." in name):
            x = interleave(x, c["heads"] if ".attn_q." in name else c["kv"])
        w.add_tensor(name, gguf.quants.quantize(x, kind), raw_dtype=kind)

    d, q, kv = c["hidden"], c["heads"] * c["hd"], c["kv"] * c["hd"]
    add("token_embd.weight", len(tokens), d)
    for i in range(LAYERS):
        p = f"blk.{i}."
        add(p + "attn_norm.weight", d, norm=True)
        add(p + "attn_q.weight", q, d)
        add(p + "attn_k.weight", kv, d)
        add(p + "attn_v.weight", kv, d)
        if arch == "qwen2":
            add(p + "attn_q.bias", q)
            add(p + "attn_k.bias", kv)
            add(p + "attn_v.bias", kv)
        if arch == "qwen3":
            add(p + "attn_q_norm.weight", c["hd"], norm=True)
            add(p + "attn_k_norm.weight", c["hd"], norm=True)
        add(p + "attn_output.weight", d, q)
        add(p + "ffn_norm.weight", d, norm=True)
        add(p + "ffn_gate.weight", c["ffn"], d)
        add(p + "ffn_up.weight", c["ffn"], d)
        add(p + "ffn_down.weight", d, c["ffn"])
    add("output_norm.weight", d, norm=True)
    if not c["tied"]:
        add("output.weight", len(tokens), d)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def main(out):
    out.mkdir(parents=True, exist_ok=True)
    for n, (arch, c) in enumerate(CASES.items()):
        family = "smollm" if c["pre"] == "smollm" else "qwen2"
        tokenizer = json.loads((pathlib.Path("model/tokenizer/testdata") / family / "tokenizer.json").read_text())
        path = out / f"{arch}.gguf"
        write(path, arch, c, tokenizer, np.random.default_rng(n))
        cfg = transformers.AutoConfig.from_pretrained(out, gguf_file=path.name)
        cfg.head_dim = c["hd"]  # transformers 5.23 does not read qwen3.attention.key_length
        model = transformers.AutoModelForCausalLM.from_pretrained(out, gguf_file=path.name, config=cfg, dtype=torch.float32)
        assert cfg.model_type == arch and cfg.tie_word_embeddings == c["tied"], (cfg.model_type, cfg.tie_word_embeddings)
        tensors = {}
        for name, x in model.state_dict().items():
            if name == "lm_head.weight" and c["tied"]:
                continue
            x = x.numpy().astype("<f4")
            tensors[name] = {"shape": list(x.shape), "sha256": hashlib.sha256(x.tobytes()).hexdigest(), "head": [float(v) for v in x.flatten()[:4]]}
        golden = {"vocab": cfg.vocab_size, "hidden": cfg.hidden_size, "ffn": cfg.intermediate_size, "layers": cfg.num_hidden_layers, "heads": cfg.num_attention_heads,
                  "kv_heads": cfg.num_key_value_heads, "head_dim": c["hd"], "theta": cfg.rope_parameters["rope_theta"], "eps": c["eps"], "tied": c["tied"], "positions": cfg.max_position_embeddings,
                  "bos": cfg.bos_token_id, "eos": cfg.eos_token_id, "tensors": tensors}
        (out / f"{arch}.json").write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else "model/gguf/testdata"))
