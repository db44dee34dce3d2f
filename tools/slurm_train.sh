#!/usr/bin/env bash
# Train under Slurm.
# Usage: slurm_train.sh PARTITION JOB_NAME CONFIG [flags of train.py]
# Environment: GPUS, GPUS_PER_NODE, CPUS_PER_TASK, PORT, SRUN_ARGS, PYTHON
# Two minutes before the time limit, and when it is preempted, the run saves its state and ends with
# exit code 75; start it again with --resume.
set -euo pipefail
if [[ $# -lt 3 ]]; then
    echo "usage: $0 PARTITION JOB_NAME CONFIG [flags of train.py]" >&2
    exit 2
fi
command -v srun >/dev/null || { echo "error: srun not found: this needs Slurm" >&2; exit 1; }
partition=$1 job=$2
shift 2
read -ra srun_args <<<"${SRUN_ARGS:-}"  # several words
export MASTER_PORT=${MASTER_PORT:-${PORT:-29500}}
exec srun -p "$partition" --job-name "$job" --gres "gpu:${GPUS_PER_NODE:-4}" \
    --ntasks "${GPUS:-4}" --ntasks-per-node "${GPUS_PER_NODE:-4}" \
    --cpus-per-task "${CPUS_PER_TASK:-5}" --kill-on-bad-exit 1 --signal USR1@120 \
    "${srun_args[@]}" \
    "${PYTHON:-python}" -u "$(dirname "$0")/train.py" "$@" --launcher slurm
