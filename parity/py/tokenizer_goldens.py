"""Writes model/tokenizer/testdata: four small tokenizers of the supported
families, trained here, and the ids that Python's tokenizers gives for the corpus."""

import json
import pathlib
import sys

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import corpus

LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def split(pattern):
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def families():
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    yield "gpt2", None, byte_level, False
    yield "smollm", None, pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level]), False
    yield "qwen2", normalizers.NFC(), split(QWEN2), False
    yield "llama3", None, split(LLAMA3), True


def main(out):
    out.mkdir(parents=True, exist_ok=True)
    texts = corpus.texts()
    golden = {"texts": texts, "ids": {}, "decoded": {}}
    for name, normalizer, pre, whole in families():
        t = Tokenizer(models.BPE())
        if normalizer:
            t.normalizer = normalizer
        t.pre_tokenizer, t.decoder, t.post_processor = pre, decoders.ByteLevel(), processors.ByteLevel(trim_offsets=False)
        # gpt2 goes without the full byte alphabet, as SmolLM2 does: bytes it never saw are left out.
        alphabet = [] if name == "gpt2" else pre_tokenizers.ByteLevel.alphabet()
        t.train_from_iterator(corpus.PLAIN, trainers.BpeTrainer(vocab_size=900, min_frequency=1, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False))
        # User-defined tokens, one of them matched after the normalizer, one a prefix of another.
        t.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("<tools>", normalized=False), AddedToken("</tool>", normalized=True)])
        j = json.loads(t.to_str())
        j["model"]["ignore_merges"] = whole
        if name == "gpt2":  # the older form of the merges
            j["model"]["merges"] = [" ".join(m) for m in j["model"]["merges"]]
        t = Tokenizer.from_str(json.dumps(j))
        d = out / name
        d.mkdir(exist_ok=True)
        (d / "tokenizer.json").write_text(json.dumps(j, ensure_ascii=False, separators=(",", ":")) + "\n")
        config = {"eos_token": "<|im_end|>", "bos_token": {"content": "<|im_start|>"}, "pad_token": None}
        (d / "tokenizer_config.json").write_text(json.dumps(config) + "\n")
        golden["ids"][name] = [t.encode(x, add_special_tokens=False).ids for x in texts]
        golden["decoded"][name] = [t.decode(ids, skip_special_tokens=True) for ids in golden["ids"][name]]
    (out / "corpus.json").write_text(json.dumps(golden, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else "model/tokenizer/testdata"))
