#!/usr/bin/env bash
# Train on the GPUs of one machine, or of NNODES machines with this started on each of them.
# Usage: dist_train.sh CONFIG GPUS [flags of train.py]
# Environment: NNODES, NODE_RANK, MASTER_ADDR, PORT, PYTHON
set -euo pipefail
if [[ $# -lt 2 || ! $2 =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: $0 CONFIG GPUS [flags of train.py], GPUS from 1 up" >&2
    exit 2
fi
config=$1 gpus=$2
shift 2
exec "${PYTHON:-python}" -m torch.distributed.run \
    --nnodes "${NNODES:-1}" --node_rank "${NODE_RANK:-0}" --nproc_per_node "$gpus" \
    --master_addr "${MASTER_ADDR:-127.0.0.1}" --master_port "${PORT:-29500}" \
    "$(dirname "$0")/train.py" "$config" --launcher pytorch "$@"
