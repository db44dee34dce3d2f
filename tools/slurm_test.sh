#!/usr/bin/env bash
# Test under Slurm.
# Usage: slurm_test.sh PARTITION JOB_NAME CONFIG CHECKPOINT [flags of test.py]
# Environment: GPUS, GPUS_PER_NODE, CPUS_PER_TASK, PORT, SRUN_ARGS, PYTHON
set -euo pipefail
if [[ $# -lt 4 ]]; then
    echo "usage: $0 PARTITION JOB_NAME CONFIG CHECKPOINT [flags of test.py]" >&2
    exit 2
fi
command -v srun >/dev/null || { echo "error: srun not found: this needs Slurm" >&2; exit 1; }
partition=$1 job=$2
shift 2
read -ra srun_args <<<"${SRUN_ARGS:-}"  # several words
export MASTER_PORT=${MASTER_PORT:-${PORT:-29500}}
exec srun -p "$partition" --job-name "$job" --gres "gpu:${GPUS_PER_NODE:-4}" \
    --ntasks "${GPUS:-4}" --ntasks-per-node "${GPUS_PER_NODE:-4}" \
    --cpus-per-task "${CPUS_PER_TASK:-5}" --kill-on-bad-exit 1 "${srun_args[@]}" \
    "${PYTHON:-python}" -u "$(dirname "$0")/test.py" "$@" --launcher slurm
