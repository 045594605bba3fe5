#!/usr/bin/env bash
# device.sh check|check2|time|time2|time3 [SECONDS]: the CUDA device on a real card.
# Needs .device/ (make device-bundle), CUDA and PyTorch with transformers; no Go.
# Writes one JSON object per line to $OUT/results-WHAT.jsonl (OUT: out/device-results)
# and to stdout, everything else to $OUT/SECTION.log. Every section has its own limit,
# and all together SECONDS (570), so that one that hangs costs only itself.
# Exits 1 when a section failed or could not be run; ends with a summary of all.
#
# A dry run on a machine without a card takes the same command lines at sizes of no
# consequence (make device-dry): DEVICE=cpu SHAPE=smoke LOAD=smoke MODES=eager TRAINERD=bin/trainerd.
set -uo pipefail
cd "$(dirname "$0")/.."
what=${1:-check} total=${2:-570}
OUT=${OUT:-out/device-results}
mkdir -p "$OUT" out/device-run
run=$PWD/out/device-run python=${PYTHON:-python3}
device=${DEVICE:-cuda:0} trainerd=${TRAINERD:-$run/trainerd-cuda}
results=$OUT/results-$what.jsonl
: >"$results"
passed=0 failed=0 notrun=0
say() { echo "$1" | tee -a "$results"; }

# notrun NAME WHY: a section that cannot be run here is no pass.
notrun() {
  notrun=$((notrun + 1))
  say "{\"section\":\"$1\",\"rc\":-1,\"why\":\"NOT RUN: $2\"}"
}

# section NAME SECONDS COMMAND...: lines of the command that are JSON objects become results.
# Of a failure NAME.failed keeps 200 lines from the first that looks like its cause.
section() {
  local name=$1 limit=$2 start=$SECONDS rc pid
  shift 2
  [ $((total - SECONDS)) -lt "$limit" ] && limit=$((total - SECONDS))
  if [ "$limit" -lt 3 ]; then
    notrun "$name" "no time left"
    return
  fi
  timeout -k 5 "$limit" "$@" >"$OUT/$name.log" 2>&1 &
  pid=$!
  # A process that is stuck in the driver does not die: it is left behind.
  while kill -0 $pid 2>/dev/null && [ $((SECONDS - start)) -lt $((limit + 8)) ]; do sleep 0.2; done
  if kill -0 $pid 2>/dev/null; then rc=137; else
    wait $pid
    rc=$?
  fi
  grep -hE '^\{"name".*\}$' "$OUT/$name.log" | while read -r line; do say "$line"; done
  say "{\"section\":\"$name\",\"rc\":$rc,\"seconds\":$((SECONDS - start)),\"limit\":$limit}"
  if [ $rc = 0 ]; then
    passed=$((passed + 1))
    return 0
  fi
  failed=$((failed + 1))
  awk -v cause='--- FAIL|^panic|^FAIL|Traceback|ERROR SUMMARY: [1-9]|========= [A-Z]|cuda: |_test\\.go:[0-9]+: |run\\.go:[0-9]+: |rror' '!seen && $0 ~ cause { seen = 1 } seen && n++ < 200' "$OUT/$name.log" >"$OUT/$name.failed"
  [ -s "$OUT/$name.failed" ] || tail -n 200 "$OUT/$name.log" >"$OUT/$name.failed"
  [ -s "$OUT/$name.failed" ] || echo "no output in $((SECONDS - start)) s" >"$OUT/$name.failed"
  head -n 15 "$OUT/$name.failed"
  return 1
}

# unpack brings .device/ to $run, when all of it is there.
unpack() {
  (cd .device && sha256sum -c --quiet sums) || { echo ".device is not whole: make device-bundle, and copy every file of it"; return 1; }
  if command -v xz >/dev/null; then xz -dc .device/bin.tar.xz; else "$python" -c 'import lzma, shutil, sys; shutil.copyfileobj(lzma.open(sys.argv[1]), sys.stdout.buffer)' .device/bin.tar.xz; fi | tar -C "$run" -xf - || return 1
  cat .device/smollm2.[0-9]* >"$run/smollm2.gguf" || return 1
  rm -rf "$run/smollm2"
  "$run/trainerd-cuda" --json import "$run/smollm2.gguf" "dir:$run/smollm2"
}

# cuBLASLt comes with PyTorch's wheels or with the toolkit. The wheels go first, so that PyTorch
# gets its own and both sides of a comparison the same.
libraries=$("$python" -c 'import glob, importlib.util as u, os; s = u.find_spec("nvidia"); print(":".join(p for d in (s.submodule_search_locations if s else []) for p in sorted(glob.glob(os.path.join(d, "*", "lib")))))' 2>/dev/null || true)
export LD_LIBRARY_PATH=${libraries:+$libraries:}${CUDA_HOME:-/usr/local/cuda}/lib64:${LD_LIBRARY_PATH:-} HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
sanitizer=$(command -v compute-sanitizer || echo "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer")

timeout 20 nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv,noheader >"$OUT/machine.log" 2>&1
say "{\"name\":\"machine\",\"what\":\"$(tr -d '"\\' <"$OUT/machine.log" | tr '\n' ' ')\"}"
export -f unpack
export run python device trainerd
# finish ends with a short summary: the last 12,000 characters of the output are all that may be seen.
finish() {
  say "{\"name\":\"summary\",\"what\":\"$what\",\"passed\":$passed,\"failed\":$failed,\"not_run\":$notrun,\"seconds\":$SECONDS}"
  echo "==== $what: $passed passed, $failed FAILED, $notrun NOT RUN in $SECONDS s"
  {
    grep -E '"section"|"name":"(machine|commit|torch|row|score|decode|ceilings)"' "$results" | cut -c 1-900
    for f in "$OUT"/*.failed; do
      [ -s "$f" ] || continue
      echo "-- $(basename "$f")"
      { grep -E 'FAIL|rror|panic|expected|m [0-9]+ n [0-9]+ k [0-9]+' "$f" || cat "$f"; } | head -n 6 | cut -c 1-240
    done
  } | head -c 10500
  echo
  echo "==== $what: $passed passed, $failed FAILED, $notrun NOT RUN"
  [ $((failed + notrun)) = 0 ]
  exit
}
rm -f "$OUT"/*.failed
if [ -z "${TRAINERD:-}" ]; then section unpack 45 bash -c unpack || finish; fi
say "{\"name\":\"commit\",\"commit\":\"$(cat "$run/commit" 2>/dev/null)\"}"
# PyTorch is looked for once; sections that compare with it are not run without it.
torch='' # why not
section torch 60 "$python" -c 'import json, sys, torch
on = sys.argv[1] == "cpu" or torch.cuda.is_available()
print(json.dumps({"name": "torch", "version": torch.__version__, "cuda": torch.version.cuda, "sees_card": torch.cuda.is_available()}))
sys.exit(not on)' "$device" || torch="python finds no PyTorch that sees the card"
# compare NAME SECONDS COMMAND...: a section that needs PyTorch, and for a whole model transformers.
compare() { if [ -n "$torch" ]; then notrun "$1" "$torch"; else section "$@"; fi; }
# sanitize NAME SECONDS TOOL...: a section under compute-sanitizer.
sanitize() {
  local name=$1 limit=$2
  shift 2
  if [ -x "$sanitizer" ]; then section "$name" "$limit" "$sanitizer" --tool "$@"; else notrun "$name" "no compute-sanitizer in PATH or CUDA_HOME"; fi
}

# The loop over HTTP on the card, its last checkpoint in transformers, then the same loop again: every
# published weight must have the same bits. The second keeps the first's choice of algorithms: server DIR
server() {
  local published one two
  rm -rf "$1" "$1-again"
  "$run/trainerd-cuda" demo --smollm2 "$run/smollm2.gguf" --device cuda:0 --keep "$1" || return 1
  published=$(find "$1/store" -type d -name hf | sort | tail -n 1)
  [ -n "$published" ] || { echo "nothing was published"; return 1; }
  "$python" bench/device_compare.py "$run/probe" cuda:0 "$published" --short || return 1
  mkdir -p "$1-again/data" && cp "$1/data/cuda-algorithms.json" "$1-again/data/" || return 1
  "$run/trainerd-cuda" demo --smollm2 "$run/smollm2.gguf" --device cuda:0 --keep "$1-again" || return 1
  one=$(weights "$1") two=$(weights "$1-again")
  [ "$one" = "$two" ] || { echo "FAIL: two runs of one job published other weights"; diff <(echo "$one") <(echo "$two"); return 1; }
  echo "{\"name\":\"repeated\",\"checkpoints\":$(echo "$one" | wc -l),\"same_bits\":true}"
}
# weights DIR: SHA-256 of all published weights below it, in order of their steps.
weights() { find "$1/store" -name '*.safetensors' | sort | xargs -r sha256sum | cut -d ' ' -f 1; }
# ours WHAT FLAGS...: trainerd bench on the device; SHAPE and LOAD of a dry run replace what the flags say.
ours() {
  local what=$1 args=() name
  shift
  while [ $# -gt 0 ]; do
    name=$1
    shift
    case $name in
      --shape) args+=("$name" "${SHAPE:-$1}") && shift ;;
      --load) args+=("$name" "${LOAD:-$1}") && shift ;;
      *) args+=("$name") ;;
    esac
  done
  "$trainerd" bench "$what" --device "$device" "${args[@]}"
}
# baseline WHAT FLAGS...: torch_baseline.py on the device.
baseline() { "$python" bench/torch_baseline.py "$@" --device "${device%%:*}"; }
# step SHAPE LOAD MODES FLAGS...: ours and PyTorch's in the same run, and both in one row.
step() {
  set -o pipefail
  local shape=${SHAPE:-$1} load=${LOAD:-$2} modes=${MODES:-$3} ours theirs
  shift 3
  ours=$(mktemp) theirs=$(mktemp)
  ours step --shape "$shape" --load "$load" --floor "$@" | tee "$ours" || return 1
  baseline step --shape "$shape" --load "$load" --modes "$modes" --repeats 4 | tee "$theirs" || return 1
  "$python" - "$ours" "$theirs" <<'P'
import json, sys
read = lambda p: [json.loads(l) for l in open(p) if l.startswith("{")]
ours = [r for r in read(sys.argv[1]) if r["name"] == "step"][-1]
torch = [r for r in read(sys.argv[2]) if r["name"] == "step"]
best = max((r for r in torch if r.get("rollouts_s")), key=lambda r: r["rollouts_s"], default=None)
row = {"name": "row", "shape": ours["shape"], "load": ours["load"], "rollouts_s": round(ours["rollouts_s"], 2), "step_s": ours["step_s"],
       "floor_rollouts_s": round(ours["floor_rollouts_s"], 1), "share_of_floor": round(ours["mfu"], 4), "matmul_tflop_s": round(ours["matmul_tflop_s"], 1),
       "mfu_990": round(ours["useful_gflop_s"] / 990e3, 4), "peak_GiB": round(ours["peak_bytes"] / 2**30, 2), "moments": ours["moments"],
       "gradients": ours["gradients"], "recompute": ours["recompute"], "recompute_more": ours["recompute_more"]}
if best:
    row |= {"torch_rollouts_s": best["rollouts_s"], "torch_mode": best["mode"], "torch_peak_GiB": best["peak_GiB"], "ratio": round(best["step_s"] / ours["step_s"], 3)}
else:
    row |= {"torch_error": [r.get("error") for r in torch]}
if "profile" in ours:
    p = ours["profile"]
    row |= {"profile_ms": {x["phase"]: round(1e3 * x["s"], 3) for x in p["phases"]} | {"launch gaps": round(1e3 * p["gaps_s"], 3), "step": round(1e3 * p["step_s"], 3)},
            "profile_residue": round(p["residue"], 5), "profile_overhead": round(p["overhead"], 4)}
print(json.dumps(row))
P
}
export -f server weights ours baseline step

case $what in
  check)
    # All limits, those of unpack and torch too, add up to 565 seconds: no section ends for want of time.
    section kernels-small 60 "$run/cuda.test" -test.run 'TestDevice' -kerneltest.budget 2e8 -test.v
    section models 60 "$run/cuda.test" -test.run 'TestModels|TestMaster|TestStaging|TestMemory|TestPins|TestProfiledStep|TestCardNumber|TestTooMuch' -test.v
    section reopen 30 "$run/cuda.test" -test.run 'TestReopen' -test.v
    compare compare-smollm2 110 "$python" bench/device_compare.py "$run/probe" cuda:0 "$run/smollm2" --steps 20
    compare compare-0.5b 90 "$python" bench/device_compare.py "$run/probe" cuda:0 random-0.5b
    section server 110 bash -c "server $run/demo"
    ;;
  # Beside check: what takes long and is not needed to go on to the timings.
  check2)
    sanitize memcheck 80 memcheck --error-exitcode 9 "$run/cuda.test" -test.run 'TestDevice' -kerneltest.budget 9e5
    sanitize racecheck 80 racecheck --error-exitcode 9 "$run/cuda.test" -test.run 'TestDevice/(norm|rope|attention|decode|head|surrogate|sample|optimizer)' -kerneltest.budget 9e5
    section kernels-large 200 "$run/cuda.test" -test.run 'TestDevice' -kerneltest.budget 1e11 -test.v
    ;;
  # The first call: the load that matters, by kernel and by phase, beside PyTorch; then the other two loads.
  time)
    compare ceilings 45 bash -c 'baseline ceilings'
    section kernels-0.5b 100 bash -c 'ours kernels --shape 0.5b --load secloop'
    section step-0.5b-secloop 190 bash -c 'step 0.5b secloop eager,compile --profile'
    # Both kinds of attention, side by side: which one is the faster decides the default.
    [ -n "${SHAPE:-}" ] || section wgmma-0.5b 60 bash -c 'for op in attention "attention backward"; do ours kernels --shape 0.5b --load secloop --only "$op" --attention wgmma || exit 1; done; ours step --shape 0.5b --load secloop --repeats 4 --attention wgmma'
    section step-0.5b-flat 130 bash -c 'step 0.5b flat compile --profile'
    section step-0.5b-reason 150 bash -c 'step 0.5b reason compile --profile'
    ;;
  # The second: scoring, decoding, the fused head beside PyTorch's, other shapes, growth.
  time2)
    section score-0.5b 45 bash -c 'ours score --shape 0.5b --load secloop --floor'
    section decode-0.5b 50 bash -c "ours decode --shape 0.5b --sequences 64 ${SHAPE:+--prompt 16 --new-tokens 4}"
    section step-1.5b-secloop 160 bash -c 'step 1.5b secloop compile --profile'
    section step-135m-secloop 120 bash -c 'step 135m secloop compile --profile'
    [ -n "${SHAPE:-}" ] || compare logprob-torch 90 bash -c 'baseline logprob'
    section step-0.5b-host-moments 60 bash -c "for f in '--moments float32' '--moments compact --gradients bfloat16'; do ours step --shape 0.5b --load secloop --repeats 2 \$f --profile $([ -n "${SHAPE:-}" ] || echo --moments-in host); done"
    section growth-0.5b 130 bash -c "ours growth --shape 0.5b --repeats 3 --plots $OUT ${SHAPE:+--prompt 16 --completion 4 --group-size 4}"
    ;;
  # The third: 7B full-parameter, and the kernels at larger sizes.
  time3)
    section step-7b-secloop 300 bash -c 'step 7b secloop eager --repeats 2 --moments compact --gradients bfloat16 --profile'
    section kernels-1.5b 110 bash -c 'ours kernels --shape 1.5b --load secloop'
    section kernels-7b 130 bash -c 'ours kernels --shape 7b --load secloop'
    ;;
  *)
    echo "device.sh: $what, expected check, check2, time, time2 or time3" >&2
    exit 2
    ;;
esac
finish
