#!/usr/bin/env bash
# device_dry.sh TRAINERD PYTHON [WHAT...]: the timing calls of device.sh on the CPU at
# sizes of no consequence, so that no command line of theirs is tried first on a card.
# Exits 1 unless every section passed and printed the results that it is for.
set -euo pipefail
cd "$(dirname "$0")/.."
export TRAINERD=$1 PYTHON=$2 DEVICE=cpu SHAPE=smoke LOAD=smoke MODES=eager OUT=out/device-dry
shift 2
[ $# -gt 0 ] || set -- time time2 time3
rm -rf "$OUT"
for what in "$@"; do
  bench/device.sh "$what" >/dev/null || { cat "$OUT/results-$what.jsonl"; exit 1; }
done
"$PYTHON" - "$OUT" "$@" <<'P'
import collections, json, pathlib, sys
want = {"time": {"matmul_1024": 1, "copy_64MiB": 1, "ceilings": 1, "kernel": 40, "step": 6, "row": 3},
        "time2": {"score": 1, "decode": 1, "step": 6, "row": 2, "growth": 15}, "time3": {"step": 2, "row": 1, "ceilings": 2, "kernel": 80}}
ok = True
for what in sys.argv[2:]:
    lines = [json.loads(l) for l in (pathlib.Path(sys.argv[1]) / f"results-{what}.jsonl").read_text().splitlines()]
    seen = collections.Counter(l["name"] for l in lines if "name" in l)
    for name, n in want[what].items():
        if seen[name] < n:
            ok = False
            print(f"{what}: {seen[name]} results named {name}, expected {n} or more")
    for l in lines:
        if l.get("name") == "row" and not (l.get("ratio", 0) > 0 and l["share_of_floor"] > 0 and l["profile_ms"]["step"] > 0):
            ok = False
            print(f"{what}: an incomplete row {l}")
    print(what, json.dumps(seen))
sys.exit(not ok)
P
