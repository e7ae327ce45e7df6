#!/usr/bin/env bash
# The figures of docs/results/h100.md that need no server of ours, on one GPU: a file for each step in $OUT, its log beside it.
# 1 to 3 minutes a step.
#
#   MODEL=DIRECTORY OUT=DIRECTORY [DEMO=DIRECTORY] loadtests/gpu/one_gpu.sh [--dry-run] [NAME ...]
#
# MODEL may hold no weights. DEMO: the demo's checkpoint with its weights, for `answers`. With names, only those steps.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
: "${MODEL:?names the directory of the checkpoint}" "${OUT:?names a directory for the figures}"
. loadtests/gpu/named.sh

# step NAME COMMAND...: its figures into $OUT/NAME.txt.
step() {
  local name=$1
  shift
  asked "$name" || return 0
  echo "+ $name: $*"
  [ -n "$DRY" ] && return
  "$@" > "$OUT/$name.txt" 2> "$OUT/$name.log" || { failed=1; tail -5 "$OUT/$name.log"; }
  grep -h '^{\|passed\|failed' "$OUT/$name.txt" || true
}

# offline NAME ATTENTION WORD...
offline() {
  local name=$1 attention=$2
  shift 2
  step "$name" python3 -m loadtests.gpu.offline "$MODEL" --attention "$attention" "$@"
}

mkdir -p "$OUT"
export BORG_GPU_MODEL=$MODEL BORG_GPU_DEMO=${DEMO:-}
step attention python3 -m pytest -m gpu tests/gpu/test_attention.py tests/gpu/test_ids.py
step answers python3 -m pytest -m gpu -s tests/gpu/test_answers.py
for parts in 1 2 4; do
  step "layers-tp$parts" python3 -m loadtests.gpu.layers "$MODEL" --tensor-parallel $parts
done
for attention in stock shared; do
  offline "bf16-$attention" $attention --users 1 16 64 256 --repeats 4
  offline "fp8-$attention" $attention --users 256 512 --engine '{"quantization":"fp8"}'
  offline "kv8-$attention" $attention --engine '{"kv_cache_dtype":"fp8"}'
done
offline unshared stock --cases unshared --repeats 2
offline cascade cascade
exit $failed
