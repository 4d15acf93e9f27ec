#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# One engine with ranks on two nodes. Both need the same Python environment, with vllm-nanocp[ray], and the model.
#
#   first node:    ./two_nodes.sh head                   starts Ray
#   second node:   ./two_nodes.sh join ADDRESS           ADDRESS: of the first, as the second reaches it
#   first node:    ./two_nodes.sh serve MODEL RANKS ...  further arguments go to vllm serve
#   both, after:   ./two_nodes.sh stop                   stops Ray on this node, with all that runs in it
set -euo pipefail

port=${RAY_PORT:-6379}
action=${1:-}
case "$action" in
head) ray start --head --port "$port" ;;
join) ray start --address "${2:?address of the first node}:$port" ;;
serve)
    model=${2:?model}
    ranks=${3:?number of ranks}
    shift 3
    RAY_ADDRESS=${RAY_ADDRESS:-127.0.0.1:$port} exec vllm serve "$model" --data-parallel-size "$ranks" \
        --enable-expert-parallel --nanocp --distributed-executor-backend ray "$@"
    ;;
stop) ray stop ;;
*) sed -n '3,9p' "$0" >&2; exit 2 ;;
esac
