#!/usr/bin/env bash
# kernels.sh [--update]: compiles every .cu of this folder into fatbin/ (sm_80,
# sm_90a and PTX for what comes later), and holds what ptxas says of each kernel to
# the committed table ptxas.txt: kernel, architecture, registers, bytes spilled to
# local memory. More spilled bytes than the table allows, or a kernel that is not
# in it, fail; --update writes the table anew.
set -euo pipefail
cd "$(dirname "$0")"
toolkit=$(./toolkit.sh)
flags=(-O3 -std=c++17 -gencode arch=compute_80,code=sm_80 -gencode arch=compute_90a,code=sm_90a -gencode arch=compute_80,code=compute_80)
mkdir -p fatbin
for f in *.cu; do
  name=${f%.cu} log=fatbin/${f%.cu}.log
  stamp=$({ "$toolkit/bin/nvcc" --version; echo "${flags[*]}"; cat "$f" ./*.cuh; } | sha256sum)
  if [ -s "fatbin/$name.fatbin" ] && [ "$(cat "fatbin/$name.stamp" 2>/dev/null)" = "$stamp" ]; then
    continue
  fi
  echo "nvcc $f" >&2
  if ! "$toolkit/bin/nvcc" -fatbin "${flags[@]}" -Xptxas -v -o "fatbin/$name.fatbin" "$f" 2>"$log"; then
    cat "$log" >&2
    rm -f "fatbin/$name.fatbin"
    exit 1
  fi
  grep -iE 'warning|error' "$log" >&2 || true
  echo "$stamp" >"fatbin/$name.stamp"
done
# A fatbin of a source that is gone must not be embedded.
for b in fatbin/*.fatbin; do
  name=$(basename "$b" .fatbin)
  [ -f "$name.cu" ] || rm -f "fatbin/$name".*
done
cat fatbin/*.log | awk '
  /Compiling entry function/ { split($0, q, "\047"); kernel = q[2]; arch = q[4] }
  /spill stores/ { for (i = 1; i < NF; i++) { if ($(i+2) == "spill" && $(i+3) ~ /^stores/) stores = $i; if ($(i+2) == "spill" && $(i+3) ~ /^loads/) loads = $i } }
  /Used [0-9]+ registers/ { for (i = 1; i < NF; i++) if ($i == "Used") print kernel, arch, $(i+1), stores + loads; stores = loads = 0 }
' | sort -u >fatbin/ptxas.txt
if [ "${1:-}" = --update ]; then
  { echo "# kernel arch registers spill_bytes; written by kernels.sh --update"; cat fatbin/ptxas.txt; } >ptxas.txt
fi
awk '
  FNR == NR { if ($1 != "#") allowed[$1 " " $2] = $4; next }
  { n++; key = $1 " " $2
    if (!(key in allowed)) { print "ptxas: " key " is not in ptxas.txt; run kernels/cuda/kernels.sh --update and look at it"; bad = 1 }
    else if ($4 > allowed[key]) { print "ptxas: " key " spills " $4 " bytes, expected at most " allowed[key]; bad = 1 }
    seen[key] = 1 }
  END { for (key in allowed) if (!(key in seen)) { print "ptxas: " key " is in ptxas.txt and was not compiled"; bad = 1 }
        if (n == 0) { print "ptxas: no kernel was compiled"; bad = 1 }
        exit bad }
' ptxas.txt fatbin/ptxas.txt >&2
echo "$(wc -l <fatbin/ptxas.txt) kernels compiled, $(awk '$4 > 0' fatbin/ptxas.txt | wc -l) of them spill as before" >&2
