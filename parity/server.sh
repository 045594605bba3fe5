# Sourced by the scripts beside it, after trainerd is set: SmolLM2 as a Hugging Face
# directory $dir/smollm2 and a server on loopback at $addr, both gone at the end.
# Its log is $dir/err. The caller is in the repository's root.
smollm2=${TRAINERD_SMOLLM2:-${XDG_CACHE_HOME:-$HOME/.cache}/trainerd/smollm2/SmolLM2.gguf}
[ -f "$smollm2" ] || { echo "$smollm2 is missing; 'make tools' fetches it" >&2; exit 1; }
dir=$(mktemp -d)
pid=
stop() {
  if [ -n "$pid" ]; then kill "$pid" 2>/dev/null || true; wait "$pid" 2>/dev/null || true; fi
  rm -rf "$dir"
}
trap stop EXIT
"$trainerd" --json import "$smollm2" "dir:$dir/smollm2" > "$dir/import" 2>&1 || { cat "$dir/import" >&2; exit 1; }
"$trainerd" --json serve --listen 127.0.0.1:0 --data "$dir/data" --store "dir:$dir/store" --device cpu > "$dir/out" 2> "$dir/err" &
pid=$!
for _ in $(seq 600); do grep -q listening "$dir/out" && break; sleep 0.1; done
addr=$(sed -n 's/.*"msg":"listening","addr":"\([^"]*\)".*/\1/p' "$dir/out")
[ -n "$addr" ] || { echo "the server did not start" >&2; cat "$dir/err" >&2; exit 1; }
