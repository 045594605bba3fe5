#!/usr/bin/env bash
# device.sh check|time [SECONDS]: the CUDA device on a real card, checks first.
# Needs .device/ (make device-bundle), CUDA and PyTorch with transformers; no Go.
# Writes one JSON object per line to $OUT/results.jsonl (OUT: out/device-results)
# and to stdout, everything else to $OUT/SECTION.log. Every section has its own limit,
# and all together SECONDS (570), so that one that hangs costs only itself.
# Exits 1 when a section failed; ends with a line that counts them.
set -uo pipefail
cd "$(dirname "$0")/.."
what=${1:-check} total=${2:-570}
OUT=${OUT:-out/device-results}
mkdir -p "$OUT" out/device-run
run=$PWD/out/device-run python=${PYTHON:-python3}
results=$OUT/results.jsonl
: >"$results"
passed=0 failed=0
say() { echo "$1" | tee -a "$results"; }

# section NAME SECONDS COMMAND...: lines of the command that are JSON objects become results.
section() {
  local name=$1 limit=$2 start=$SECONDS rc
  shift 2
  [ $((total - SECONDS)) -lt "$limit" ] && limit=$((total - SECONDS))
  if [ "$limit" -lt 3 ]; then
    failed=$((failed + 1))
    say "{\"section\":\"$name\",\"rc\":-1,\"why\":\"no time left\"}"
    return
  fi
  timeout -k 5 "$limit" "$@" >"$OUT/$name.log" 2>&1
  rc=$?
  grep -hE '^\{"name".*\}$' "$OUT/$name.log" | while read -r line; do say "$line"; done
  say "{\"section\":\"$name\",\"rc\":$rc,\"seconds\":$((SECONDS - start)),\"limit\":$limit}"
  if [ $rc = 0 ]; then passed=$((passed + 1)); else failed=$((failed + 1)); tail -n 15 "$OUT/$name.log"; fi
}

unpack() {
  xz -dc .device/bin.tar.xz | tar -C "$run" -xf - || return 1
  cat .device/smollm2.* >"$run/smollm2.gguf" || return 1
  rm -rf "$run/smollm2"
  "$run/trainerd-cuda" --json import "$run/smollm2.gguf" "dir:$run/smollm2"
}

# cuBLASLt comes with the toolkit or with PyTorch's wheels.
libraries=$("$python" -c 'import glob, os, site; print(":".join(p for s in site.getsitepackages() for p in sorted(glob.glob(os.path.join(s, "nvidia", "*", "lib")))))' 2>/dev/null || true)
export LD_LIBRARY_PATH=${CUDA_HOME:-/usr/local/cuda}/lib64:$libraries:${LD_LIBRARY_PATH:-} HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
sanitizer=$(command -v compute-sanitizer || echo "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer")

nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv,noheader >"$OUT/machine.log" 2>&1
say "{\"name\":\"machine\",\"what\":\"$(tr -d '"\\' <"$OUT/machine.log" | tr '\n' ' ')\"}"
export -f unpack
export run
section unpack 60 bash -c unpack
say "{\"name\":\"commit\",\"commit\":\"$(cat "$run/commit" 2>/dev/null)\"}"

# The loop over HTTP on the card, then its last checkpoint in transformers: server DIR
server() {
  rm -rf "$1"
  "$run/trainerd-cuda" demo --smollm2 "$run/smollm2.gguf" --device cuda:0 --keep "$1" || return 1
  local published
  published=$(find "$1/store" -type d -name hf | sort | tail -n 1)
  [ -n "$published" ] || { echo "nothing was published"; return 1; }
  "$python" bench/device_compare.py "$run/probe" cuda:0 "$published" --short
}
# step SHAPE LOAD: ours and PyTorch's in the same run, and the ratio of rollouts/s.
step() {
  "$run/trainerd-cuda" bench step --device cuda:0 --shape "$1" --load "$2" --repeats 5 | tee "$run/ours.json" || return 1
  "$python" bench/torch_baseline.py step --shape "$1" --load "$2" --modes "${3:-eager,compile}" --repeats 4 | tee "$run/torch.json" || return 1
  "$python" - "$1" "$2" "$run/ours.json" "$run/torch.json" <<'P'
import json, sys
read = lambda p: [json.loads(l) for l in open(p) if l.startswith("{")]
ours = read(sys.argv[3])[-1]["rollouts_s"]
best = max(r["rollouts_s"] for r in read(sys.argv[4]) if r.get("rollouts_s"))
print(json.dumps({"name": "ratio", "shape": sys.argv[1], "load": sys.argv[2], "ours_rollouts_s": ours, "torch_best_rollouts_s": best, "ratio": round(ours / best, 3)}))
P
}
export -f server step
export python

case $what in
  check)
    section kernels-small 60 "$run/cuda.test" -test.run 'TestDevice' -kerneltest.budget 2e8 -test.v
    section models 60 "$run/cuda.test" -test.run 'TestModels|TestMaster|TestCardNumber|TestTooMuch' -test.v
    section reopen 30 "$run/cuda.test" -test.run 'TestReopen' -test.v
    section compare-smollm2 110 "$python" bench/device_compare.py "$run/probe" cuda:0 "$run/smollm2" --steps 20
    section compare-0.5b 90 "$python" bench/device_compare.py "$run/probe" cuda:0 random-0.5b
    section memcheck 80 "$sanitizer" --tool memcheck --error-exitcode 9 "$run/cuda.test" -test.run 'TestDevice' -kerneltest.budget 9e5
    section racecheck 80 "$sanitizer" --tool racecheck --error-exitcode 9 "$run/cuda.test" -test.run 'TestDevice/(norm|rope|attention|decode|head|surrogate|sample|optimizer)' -kerneltest.budget 9e5
    section server 100 bash -c "server $run/demo"
    section kernels-large 200 "$run/cuda.test" -test.run 'TestDevice' -kerneltest.budget 1e11 -test.v
    ;;
  time)
    section ceilings 60 "$python" bench/torch_baseline.py ceilings
    section gemm 60 "$run/trainerd-cuda" bench gemm --device cuda:0
    section step-0.5b-flat 120 bash -c 'step 0.5b flat'
    section step-0.5b-secloop 120 bash -c 'step 0.5b secloop'
    section step-0.5b-reason 140 bash -c 'step 0.5b reason eager'
    section step-135m-secloop 90 bash -c 'step 135m secloop eager'
    ;;
  *)
    echo "device.sh: $what, expected check or time" >&2
    exit 2
    ;;
esac
say "{\"name\":\"summary\",\"what\":\"$what\",\"passed\":$passed,\"failed\":$failed,\"seconds\":$SECONDS}"
[ $failed = 0 ]
