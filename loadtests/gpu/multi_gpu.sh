#!/usr/bin/env bash
# Tensor parallelism and replicas on one host with several GPUs, over HTTP: a line of figures for each run in
# $OUT/multi-gpu.txt, the servers' logs beside it. Users whose answers are all as long begin and end together; then
# users whose answers differ, as people's do. About 4 minutes for each of the servers that --dry-run lists.
#
#   MODEL=DIRECTORY OUT=DIRECTORY [GPUS=8] [MORE="KEY=VALUE ..."] loadtests/gpu/multi_gpu.sh [--dry-run] [NAME ...]
#
# With names, only those of the servers: GPUs are seldom free for an hour. MORE: settings for each of them, such as
# engine.stream_interval=4.
#
# MODEL may hold no weights: speed hardly depends on them, so they are random (load_format: dummy).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
: "${MODEL:?names the directory of the checkpoint}" "${OUT:?names a directory for the figures}"
GPUS=${GPUS:-$(nvidia-smi --list-gpus | wc -l)}
PORT=${PORT:-8000}
REPEATS=${REPEATS:-3}
READY_S=${READY_S:-600}
. loadtests/gpu/named.sh
# Multicast over NVLink is left off: not every host that shares its GPUs allows it.
export NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1 NVSHMEM_DISABLE_NVLS=1
export RAY_SERVE_ENABLE_HA_PROXY=1 RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING=1 RAY_SERVE_INGRESS_REQUEST_ROUTER_FORWARD_BODY=1
export RAY_SERVE_HAPROXY_INGRESS_REQUEST_ROUTER_BUFSIZE=1114112 RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD=0 RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP=0
export RAY_SERVE_HAPROXY_RETRY_ON="conn-failure empty-response" RAY_worker_niceness=0 RAY_USAGE_STATS_ENABLED=0
PROFILE=(7b-h100 7b-h100 7b-tp2 "" 7b-tp4) # by tensor parallelism
SETTINGS=(model.path="$MODEL" model.load_format=dummy model.dtype=bfloat16)
read -ra more <<< "${MORE:-}"
SETTINGS+=("${more[@]}")

# measure NAME REPLICAS USERS COMMAND...: start a server, measure it REPEATS times after a warm-up, end it with its processes.
measure() {
  local name=$1 replicas=$2 users=$3 line repeat load
  local loads=("--users $users" "--users ${users#1 } --spread 0.5 --requests 6")
  shift 3
  asked "$name" || return 0
  echo "+ $name: $*"
  for load in "${loads[@]}"; do echo "+ $name: python3 -m loadtests.gpu.throughput http://127.0.0.1:$PORT --processes 8 $load"; done
  [ -n "$DRY" ] && return
  mark=$name-$$ # by it the server's processes are found again
  BORG_LOADTEST_MARK=$mark "$@" > "$OUT/$name.log" 2>&1 &
  server=$!
  trap finish EXIT
  begin=$SECONDS
  until curl -sf "http://127.0.0.1:$PORT/ready" > /dev/null && (($(answering) >= replicas)); do
    if ! kill -0 $server || ((SECONDS - begin > READY_S)); then
      echo "$name: not ready, see $OUT/$name.log" | tee -a "$OUT/multi-gpu.txt"
      failed=1
      finish
      return
    fi
    sleep 1
  done
  echo "$name ready after $((SECONDS - begin)) s" | tee -a "$OUT/multi-gpu.txt"
  for ((repeat = 0; repeat <= REPEATS; repeat++)); do
    for load in "${loads[@]}"; do
      # shellcheck disable=SC2086  # several words
      python3 -m loadtests.gpu.throughput "http://127.0.0.1:$PORT" --processes 8 $load | while read -r line; do
        echo "$name $repeat $line" | tee -a "$OUT/multi-gpu.txt"
      done
    done
  done
  finish
}

# answering: how many replicas answer. The first one is ready before the others; a server that is no replica counts too.
answering() {
  for _ in {1..20}; do curl -sf "http://127.0.0.1:$PORT/version" && echo; done | sort -u | wc -l
}

# finish: end the server, and what Ray leaves behind: HAProxy would keep the port.
finish() {
  trap - EXIT
  kill $server || true
  python3 -c 'import sys; from loadtests.servers.local import end; end(sys.argv[1])' "$mark"
  wait $server || true
}

# deployment FILE TP REPLICAS: a deploy file for this host alone, with so many replicas, no keys and the settings above.
deployment() {
  python3 - "$@" "$PORT" "${SETTINGS[@]}" << 'END'
import sys
from pathlib import Path

import yaml

file, tp, replicas, port, *settings = sys.argv[1:]
deploy = yaml.safe_load(Path("deploy", {"1": "7b-autoscale.yaml"}.get(tp, f"7b-tp{tp}.yaml")).read_text())
deploy |= {"proxy_location": "HeadOnly", "http_options": {"host": "127.0.0.1", "port": int(port)}}
(application,) = deploy["applications"]
changes = {"server.keys": None, "cluster.max_replicas": None, "cluster.replicas": int(replicas)}
pairs = (item.split("=", 1) for item in settings)
application["args"]["set"] |= changes | {key: yaml.safe_load(value) for key, value in pairs}
Path(file).write_text(yaml.safe_dump(deploy))
END
}

mkdir -p "$OUT"
for tp in 1 2 4; do
  ((tp <= GPUS)) || continue
  for attention in stock shared; do
    words=(--config "configs/${PROFILE[tp]}.yaml" --set "server.port=$PORT" --set "identity.attention=$attention")
    for item in "${SETTINGS[@]}"; do words+=(--set "$item"); done
    measure "tp$tp-$attention" 1 "1 64 256" python3 -m borg_serve serve "${words[@]}"
  done
  deployment "$OUT/ray-tp$tp.yaml" $tp 1
  measure "ray-tp$tp" 1 "1 64 256" serve run "$OUT/ray-tp$tp.yaml"
done
for replicas in 2 4 8; do
  ((replicas <= GPUS)) || continue
  deployment "$OUT/replicas-$replicas.yaml" 1 $replicas
  measure "replicas-$replicas" $replicas "1 $((64 * replicas)) $((256 * replicas))" serve run "$OUT/replicas-$replicas.yaml"
done
exit $failed
