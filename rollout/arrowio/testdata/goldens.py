"""Writes the golden streams of arrowio with pyarrow:

    ${XDG_CACHE_HOME:-~/.cache}/trainerd/venv/bin/python rollout/arrowio/testdata/goldens.py

v1/*.arrow are the same six rows in other encodings; decode_test.go builds the
same rows. The files are frozen: whatever reads today reads them for ever.
With --check FILE it reads a stream that arrowio wrote and prints it as JSON.
"""
import json
import os
import sys

import numpy as np
import pyarrow as pa
import pyarrow.ipc as ipc

if len(sys.argv) == 3 and sys.argv[1] == "--check":
    with ipc.open_stream(sys.argv[2]) as r:
        t = r.read_all()
        t.validate(full=True)
        print(json.dumps({"meta": {k.decode(): v.decode() for k, v in (t.schema.metadata or {}).items()}, "columns": t.to_pydict()}))
    sys.exit(0)

OUT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "v1")
G = ["alert-1", "alert-2", "alert-1", "alert-2", "alert-1", "alert-2"]
P = [[1, 2, 3] if g == "alert-1" else [7] for g in G]
C = [[10 + i] * (1 + i % 3) for i in range(6)]
FORMAT = [1.0, None, 0.5, 0.0, 1.0, 1.0]
PENALTY = [0.25, 0.5, None, 1.0, 0.0, 0.125]
LOGP = [[-0.5 * (t + 1) for t in range(len(c))] for c in C]
MASK = [[t != 1 for t in range(len(c))] for c in C]
LOGP[1][1] = None  # masked: ignored
LOGP[2][1] = float("nan")
STEP = [0, 1, None, 3, 4, 5]
TRUNC = [False, True, None, False, False, True]
ID = [f"r{i}" for i in range(6)]


def table(text=pa.utf8(), lst=pa.list_, tok=pa.int32(), flt=pa.float32(), real=pa.float32(), step=pa.int64()):
    cols = {
        "group_id": pa.array(G, pa.utf8()).cast(text) if not pa.types.is_dictionary(text) else pa.array(G).dictionary_encode(),
        "prompt_tokens": pa.array(P, lst(tok)),
        "completion_tokens": pa.array(C, lst(tok)),
        "reward_format": pa.array(FORMAT, real),
        "reward_penalty": pa.array(PENALTY, real),
        "sampler_logprobs": pa.array([[None if v is None else np.dtype("float16").type(v) if flt == pa.float16() else v for v in r] for r in LOGP], lst(flt)),
        "loss_mask": pa.array(MASK, lst(pa.bool_())),
        "policy_step": pa.array(STEP, step),
        "truncated": pa.array(TRUNC, pa.bool_()),
        "rollout_id": pa.array(ID, pa.utf8() if pa.types.is_dictionary(text) else text),
    }
    return pa.table(cols).replace_schema_metadata({"trainerd.schema": "1"})


def write(name, t, rows=None, options=None):
    with pa.OSFile(os.path.join(OUT, name + ".arrow"), "wb") as f, ipc.new_stream(f, t.schema, options=options or ipc.IpcWriteOptions()) as w:
        w.write_table(t, max_chunksize=rows)


os.makedirs(OUT, exist_ok=True)
write("plain", table())
write("batches", table(), rows=2)  # groups span record batches
write("lz4", table(), options=ipc.IpcWriteOptions(compression="lz4"))
write("zstd", table(), options=ipc.IpcWriteOptions(compression="zstd"))
write("dictionary", table(text=pa.dictionary(pa.int32(), pa.utf8())))
t = table()
a = pa.DictionaryArray.from_arrays(pa.array([0, 1], pa.int8()), pa.array(["alert-1", "alert-2"]))
b = pa.DictionaryArray.from_arrays(pa.array([1, 0, 1, 0], pa.int8()), pa.array(["alert-2", "alert-1"]))
t = t.set_column(0, "group_id", pa.chunked_array([a, b]))
write("dictionary_replaced", t)
b = pa.DictionaryArray.from_arrays(pa.array([0, 1, 0, 1], pa.int8()), pa.array(["alert-1", "alert-2", "alert-3"]))
a = pa.DictionaryArray.from_arrays(pa.array([0, 1], pa.int8()), pa.array(["alert-1", "alert-2"]))
write("dictionary_delta", t.set_column(0, "group_id", pa.chunked_array([a, b])), options=ipc.IpcWriteOptions(emit_dictionary_deltas=True))
write("large", table(text=pa.large_utf8(), lst=pa.large_list, tok=pa.int64(), flt=pa.float64(), real=pa.float64(), step=pa.uint8()))
write("narrow", table(tok=pa.uint16(), flt=pa.float16(), step=pa.int32()))
write("sliced", pa.concat_tables([table(), table(), table()]).combine_chunks().slice(6, 6))
fixed = table()
fixed = fixed.filter(pa.array([g == "alert-1" for g in G])).combine_chunks()
fixed = fixed.set_column(1, "prompt_tokens", fixed["prompt_tokens"].cast(pa.list_(pa.int32(), 3)))
write("fixed_size", fixed)
