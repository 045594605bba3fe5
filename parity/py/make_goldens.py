"""Makes every golden anew: `make goldens`, or `make_goldens.py small trl` for some.

The SmolLM2 goldens need the GGUF that `make tools` fetches (or TRAINERD_SMOLLM2),
about 8 GB of memory and, for the float64 gradient, two minutes of processor time.
"""

import os
import pathlib
import sys

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(HERE))
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def main(which):
    os.chdir(ROOT)
    out = ROOT / "parity" / "testdata"
    out.mkdir(parents=True, exist_ok=True)
    if "tokenizer" in which:
        import tokenizer_goldens
        tokenizer_goldens.main(ROOT / "model/tokenizer/testdata")
    if "gguf" in which:
        import gguf_goldens
        gguf_goldens.main(ROOT / "model/gguf/testdata")
    if "trl" in which:
        import trl_loss
        trl_loss.main(out)
    if "small" in which:
        import small
        small.main(out)
    if "smollm2" in which:
        import smollm2
        cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
        smollm2.main(out, pathlib.Path(os.environ.get("TRAINERD_SMOLLM2") or cache / "trainerd/smollm2/SmolLM2.gguf"))


if __name__ == "__main__":
    main(sys.argv[1:] or ["tokenizer", "gguf", "trl", "small", "smollm2"])
