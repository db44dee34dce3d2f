#!/usr/bin/env bash
# Train on the GPUs of one machine, or of NNODES machines with this started on each of them.
# Usage: dist_train.sh CONFIG GPUS [flags of train.py]
# Environment: NNODES, NODE_RANK, MASTER_ADDR, PORT, PYTHON, and MAX_RESTARTS: how often all processes
# are started again, to resume, after one failed (3)
# Exit code: 75 when SIGTERM or SIGUSR1 stopped it, with its state saved for --resume.
set -euo pipefail
if [[ $# -lt 2 || ! $2 =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: $0 CONFIG GPUS [flags of train.py], GPUS from 1 up" >&2
    exit 2
fi
config=$1 gpus=$2
shift 2
"${PYTHON:-python}" -m torch.distributed.run \
    --nnodes "${NNODES:-1}" --node_rank "${NODE_RANK:-0}" --nproc_per_node "$gpus" \
    --master_addr "${MASTER_ADDR:-127.0.0.1}" --master_port "${PORT:-29500}" \
    --max_restarts "${MAX_RESTARTS:-3}" \
    "$(dirname "$0")/train.py" "$config" --launcher pytorch "$@" &
launcher=$! stopped=
trap 'stopped=1; kill -TERM "$launcher" 2>/dev/null || true' TERM USR1
trap 'kill -INT "$launcher" 2>/dev/null || true' INT
while true; do  # a signal ends wait before the launcher ends
    code=0
    wait "$launcher" || code=$?
    kill -0 "$launcher" 2>/dev/null || break
done
if [[ -n $stopped && $code -ne 0 ]]; then
    code=75
    echo "$0: stopped by a signal; resume with --resume" >&2
fi
exit "$code"
