#!/usr/bin/env bash
# Prints the root of a CUDA toolkit (bin/nvcc, include/cuda.h, include/cublasLt.h):
# $CUDA_HOME or /usr/local/cuda where one of them has nvcc, else a toolkit that
# it installs once from PyPI wheels pinned to 13.0 into the user's cache.
set -euo pipefail
home=${CUDA_HOME:-/usr/local/cuda}
if [ -x "$home/bin/nvcc" ]; then
  echo "$home"
  exit
fi
cache=${XDG_CACHE_HOME:-$HOME/.cache}/trainerd/cuda-13.0
root=$cache/nvidia/cu13
packages=(
  nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88
  nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85 nvidia-cublas==13.1.0.3
)
want=${packages[*]}
if [ "$(cat "$cache/.ready" 2>/dev/null)" != "$want" ]; then
  mkdir -p "$cache"
  complete=1
  for p in "${packages[@]}"; do
    name=${p%%==*}
    [ -d "$cache/${name//-/_}-${p##*==}.dist-info" ] || complete=0
  done
  if [ $complete = 0 ]; then
    echo "toolkit: installing ${packages[*]} into $cache" >&2
    python3 -m pip install -q --disable-pip-version-check --no-deps --upgrade --target "$cache" "${packages[@]}" >&2
  fi
  # Wheels do not carry the executable bit.
  chmod +x "$root"/bin/* "$root"/nvvm/bin/*
  "$root/bin/nvcc" --version >/dev/null
  echo "$want" >"$cache/.ready"
fi
echo "$root"
