#!/usr/bin/env bash
# Fills .device/ with what bench/device.sh needs on a machine that has a GPU,
# CUDA and PyTorch but no Go: stripped binaries, and the GGUF in parts of 48 MiB, so that
# each file can be carried on its own. `make device-bundle` runs it.
set -euo pipefail
cd "$(dirname "$0")/.."
cache=${XDG_CACHE_HOME:-$HOME/.cache}/trainerd
toolkit=$(kernels/cuda/toolkit.sh)
export CGO_ENABLED=1 CGO_CFLAGS="-O2 -I$PWD/kernels/cuda/compat -I$toolkit/include" CGO_LDFLAGS="-L$PWD/out/cuda"
rm -rf .device
mkdir -p .device out/device
go build -trimpath -tags cuda -ldflags '-s -w' -o out/device/trainerd-cuda ./cmd/trainerd
go build -trimpath -tags cuda -ldflags '-s -w' -o out/device/probe ./bench/probe
go test -c -trimpath -tags cuda -ldflags '-s -w' -o out/device/cuda.test ./kernels/cuda
git rev-parse HEAD >out/device/commit
tar -C out/device -cf - trainerd-cuda probe cuda.test commit | xz -3 >.device/bin.tar.xz
split -b 48M -d "${TRAINERD_SMOLLM2:-$cache/smollm2/SmolLM2.gguf}" .device/smollm2.
(cd .device && sha256sum bin.tar.xz smollm2.* >sums)
ls -l .device
