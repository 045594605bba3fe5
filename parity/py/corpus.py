"""Texts that tell byte-level tokenizers apart: whitespace runs, digits, scripts,
contractions, code, JSON, special tokens and random mixtures."""

import random

PLAIN = [
    "", " ", "  ", "\n", "\n\n", " \n", "\t", "\r\n", "a", " a", "  a", "a ", "a  ", "a   b", "a \n b", "a\n\n\nb", "  \n  x",
    "\u00a0x", "x\u00a0\u00a0y", "x\u2003y", "x\u3000\u3000y", "x\u0085y", "x\u200by", "trailing newline\n", "tabs\t\tand\t spaces \t",
    "0", "12", "123", "1234", "12345678", "3.14159", "1e-5", "1,000,000", "v2.0.1", "10.0.0.17", "2026-11-23T10:00:00Z", "٣٤٥", "½ ⅔", "x²+y³",
    "Ⅷ", "１２３", "a1b22c333",
    "I'm you're he's we'll they'd I've don't", "I'M YOU'RE HE'S WE'LL THEY'D I'VE DON'T", "'s 't 're 've 'm 'll 'd", "''''", "rock'n'roll",
    "Hello, world!", "The quick brown fox jumps over the lazy dog.", "ALL CAPS AND lower", "snake_case camelCase kebab-case", "...---...", "!!??!?", "$100 @ 5%",
    "https://example.org/a?b=c&d=%20#frag", "user@example.com", "C:\\Windows\\System32\\cmd.exe", "/etc/ssh/sshd_config",
    "café naïve façade", "cafe\u0301 nai\u0308ve", "Å Å", "ﬁ ﬂ", "Grüße, Straße, ÄÖÜ", "Привет, мир", "Ελληνικά", "שלום עולם", "مرحبا بالعالم", "नमस्ते दुनिया", "สวัสดีชาวโลก",
    "你好，世界", "こんにちは世界", "안녕하세요 세계", "한국", "😀", "👩‍👩‍👧‍👦 family", "🇩🇪🇫🇷", "a😀b", "𝒳𝒴𝒵", "\U000f0000", "zero\x00byte", "\x01\x7f", "ſ's ẞ",
    '[{"tool":"block_ip","params":{"ip":"203.0.113.7","port":6379}}]',
    '{\n  "format": 1,\n  "execution": 0.5,\n  "nested": [1, 2, [3, null, true]]\n}',
    "def f(x):\n    if x > 10:\n        return x**2\n    return None\n", "for (int i = 0; i < n; i++) { a[i] += b[i]; }", "#!/bin/sh\nset -eu\niptables -A INPUT -s 10.0.0.0/8 -j DROP\n",
    "SELECT * FROM t WHERE a='x' OR 1=1; --", "<html><body class=\"x\">&nbsp;</body></html>", "| a | b |\n|---|---|\n| 1 | 2 |",
    "Alert: 14 connection attempts from 198.51.100.23 to redis:6379 between 10:02 and 10:05, risk HIGH.",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "                                x", "ababababababababab", "=" * 40, "-" * 17, "\n" * 9, " \n \n \n", "x" + " " * 13 + "\n" + " " * 5 + "y",
]

SPECIAL = ["<|im_start|>user\nBlock 10.0.0.1<|im_end|>\n<|im_start|>assistant\n", "<|im_start|>", "a<|im_end|>b", "<|im_end|><|im_end|>", " <|im_end|> ", "<|im_en", "<|endoftext|>cafe\u0301",
           "<tool> x </tool>", "<tool><tools>"]


def texts():
    """All texts, the random ones a pure function of the seed."""
    out = PLAIN + SPECIAL
    rng = random.Random(20261123)
    alphabet = list("abcXYZ019 \t\n.,'\"{}[]<>_-|/\\") + ["é", "e\u0301", "ß", "中", "😀", "  ", "\r\n", "'s", "<|im_end|>", "\u00a0", "٣", "½", "ह", "ि"]
    for _ in range(120):
        out.append("".join(rng.choice(alphabet) for _ in range(rng.randint(1, 40))))
    return out
