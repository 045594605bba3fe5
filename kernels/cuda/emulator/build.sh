#!/usr/bin/env bash
# build.sh OUT [card]: compiles all kernels with g++ against the emulator (../emu) into
# OUT/libemulated.so, and the stand-in for cuBLASLt, against NVIDIA's headers, into
# OUT/libcublasLt.so.13; for go test -tags cudaemu. OUT/libcuda.so.1 is the stand-in
# for the driver: with OUT in LD_LIBRARY_PATH, what is built for a card runs.
# With card, arithmetic errs as far as a card's may (../emu/emu.h; x86 only).
set -euo pipefail
out=$(mkdir -p "$1" && cd "$1" && pwd)
cd "$(dirname "$0")"
flags=(-std=c++17 -O2 -fPIC -ffp-contract=off -fno-strict-aliasing -w -DTRAINERD_EMU -I../emu -I..)
case "${2:-host}" in
host) ;;
card) flags+=(-DTRAINERD_EMU_CARD -ffp-contract=fast -mfma) ;;
*) echo "build.sh: arithmetic \"$2\", expected host or card" >&2; exit 1 ;;
esac
objects=()
compile() { # source object extra...
  local source=$1 object=$2
  shift 2
  objects+=("$object")
  if [ ! -f "$object" ] || [ -n "$(find "$source" ../*.cuh ../emu/emu.h ../emu/kernels.h "$out/calls.inc" -newer "$object" 2>/dev/null)" ]; then
    g++ "${flags[@]}" "$@" -c -o "$object" "$source"
  fi
}
for f in ../*.cu; do compile "$f" "$out/$(basename "$f" .cu).o" -include ../emu/kernels.h -x c++; done
nm --defined-only "${objects[@]}" | awk '$2 == "T" && $3 !~ /^_/ { print "KERNEL(" $3 ")" }' | sort -u >"$out/calls.new"
cmp -s "$out/calls.new" "$out/calls.inc" || mv "$out/calls.new" "$out/calls.inc"
compile ../emu/emu.cc "$out/emu.o"
compile emulated.cc "$out/emulated.o" -I"$out"
g++ -shared -o "$out/libemulated.so" "${objects[@]}"
if [ ! -f "$out/libcublasLt.so.13" ] || [ cublaslt.cc -nt "$out/libcublasLt.so.13" ]; then
  g++ -std=c++17 -O2 -fPIC -Wall -shared -isystem "$(../toolkit.sh)/include" -o "$out/libcublasLt.so.13" cublaslt.cc
fi
if [ ! -f "$out/libcuda.so.1" ] || [ -n "$(find cuda.cc "${objects[@]}" -newer "$out/libcuda.so.1")" ]; then
  g++ -std=c++17 -O2 -fPIC -Wall -shared -isystem ../compat -isystem "$(../toolkit.sh)/include" -o "$out/libcuda.so.1" cuda.cc "${objects[@]}"
fi
