#!/usr/bin/env bash
# Runs the Python of README.md and docs/training.md against a fresh server: readme.sh TRAINERD PYTHON
set -euo pipefail
cd "$(dirname "$0")/.."
trainerd=$(realpath "$1") python=$2
dir=$(mktemp -d)
trap 'kill "$pid" 2>/dev/null && wait "$pid" 2>/dev/null; rm -rf "$dir"' EXIT
awk '/^```python$/{on=1;next} /^```$/{on=0} on' README.md > "$dir/snippet.py"
lines=$(wc -l < "$dir/snippet.py")
[ "$lines" -ge 5 ] && [ "$lines" -le 20 ] || { echo "the snippet of README.md has $lines lines, expected 5 to 20"; exit 1; }
"$trainerd" init --preset bytes "dir:$dir/model"
"$trainerd" serve --listen 127.0.0.1:0 --data "$dir/data" --device cpu > "$dir/out" 2> "$dir/err" &
pid=$!
for _ in $(seq 100); do grep -q listening "$dir/out" && break; sleep 0.1; done
addr=$(sed -n 's/.*"addr":"\([^"]*\)".*/\1/p' "$dir/out")
[ -n "$addr" ] || { echo "the server did not start"; cat "$dir/err"; exit 1; }
"$python" "$dir/snippet.py" "http://$addr" "dir:$dir/model" | tee "$dir/said"
grep -q '^202 ' "$dir/said" && grep -q '^checkpoint of step 1$' "$dir/said"
awk '/^```python$/{on=1;next} /^```$/{on=0} on' docs/training.md > "$dir/training.py"
"$python" "$dir/training.py" "http://$addr" "dir:$dir/model" | tee "$dir/said"
[ "$(grep -c "^step [123] {'loss': " "$dir/said")" -eq 3 ]
