#!/usr/bin/env bash
# Test on the GPUs of one machine, or of NNODES machines with this started on each of them.
# Usage: dist_test.sh CONFIG CHECKPOINT GPUS [flags of test.py]
# Environment: NNODES, NODE_RANK, MASTER_ADDR, PORT, PYTHON
set -euo pipefail
if [[ $# -lt 3 || ! $3 =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: $0 CONFIG CHECKPOINT GPUS [flags of test.py], GPUS from 1 up" >&2
    exit 2
fi
config=$1 checkpoint=$2 gpus=$3
shift 3
exec "${PYTHON:-python}" -m torch.distributed.run \
    --nnodes "${NNODES:-1}" --node_rank "${NODE_RANK:-0}" --nproc_per_node "$gpus" \
    --master_addr "${MASTER_ADDR:-127.0.0.1}" --master_port "${PORT:-29500}" \
    "$(dirname "$0")/test.py" "$config" "$checkpoint" --launcher pytorch "$@"
