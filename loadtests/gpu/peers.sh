#!/usr/bin/env bash
# Ours beside the peer that a careful user would start, over precisions, users, prompts and identities, on one GPU: a report
# for each in $OUT. 10 to 15 minutes each.
#
#   MODEL=DIRECTORY OUT=DIRECTORY [PEER=DIRECTORY] [MORE="KEY=VALUE ..."] loadtests/gpu/peers.sh [--dry-run] [NAME ...]
#
# MODEL may hold no weights. PEER: packages with the peer's vLLM; without it, it is the installed one. MORE: settings of ours.
# With names, only those reports.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
: "${MODEL:?names the directory of the checkpoint}" "${OUT:?names a directory for the reports}"
. loadtests/gpu/named.sh
read -ra more <<< "${MORE:-}"
SETTINGS=(model.path="$MODEL" model.load_format=dummy model.dtype=bfloat16 "${more[@]}")
PEER_IS=()
if [ -n "${PEER:-}" ]; then PEER_IS=(--peer-site "$PEER"); fi
TEXT=$PWD/configs/identity/borg-merge-v1.md # 2,132 tokens

# report NAME PROFILE IDENTITY LOAD...
report() {
  local name=$1 profile=$2 identity=$3
  shift 3
  asked "$name" || return 0
  local words=(python3 -m loadtests.experiments.peers --config "configs/$profile.yaml" --name "peers-$name" --out "$OUT" --loads "$@")
  words+=(--set "${SETTINGS[@]}" identity.prompt="$identity" "${PEER_IS[@]}")
  echo "+ $name: ${words[*]}"
  [ -n "$DRY" ] || "${words[@]}" 2> "$OUT/$name.log" || { failed=1; tail -5 "$OUT/$name.log"; }
}

DIFFER=(256:0.5:6 64:0.5:8)
short=$OUT/identity-short.md long=$OUT/identity-long.md
if [ -z "$DRY" ]; then
  mkdir -p "$OUT"
  head -c $(($(wc -c < "$TEXT") / 4)) "$TEXT" | iconv -c -t utf-8 > "$short" # about 500 tokens
  for _ in 1 2 3 4; do cat "$TEXT"; done | head -c $(($(wc -c < "$TEXT") * 15 / 4)) | iconv -c -t utf-8 > "$long" # about 8,000 tokens
fi
for precision in bf16 fp8; do
  profile=7b-h100
  users=("${DIFFER[@]}" 16:0.5:8 1:0.5:6 256:0:4 64:0:4)
  if [ $precision = fp8 ]; then profile+=-fp8; users+=(512:0.5:4); fi # which has places for so many
  report $precision $profile "$TEXT" "${users[@]}"
  report $precision-prompts $profile "$TEXT" 256:0.5:4:900 64:0.5:4:900
done
report identity-short 7b-h100 "$short" "${DIFFER[@]}"
report identity-long 7b-h100 "$long" "${DIFFER[@]}"
exit $failed
