#!/usr/bin/env bash
# From the repository's root, on a file system that all nodes see: sbatch examples/llama-2-70b/slurm.sh [--model FOLDER] [--data PATH] …
#SBATCH --job-name=llama-2-70b-exits
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
set -uo pipefail
run=runs/llama-2-70b
master=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
before=$(cat "$run/checkpoints/latest" 2>/dev/null)

# Five minutes before the time is up, SIGUSR1 has the run save at the end of its step and leave.
srun --kill-on-bad-exit=0 torchrun --nnodes "$SLURM_NNODES" --nproc-per-node 8 \
    --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$master:29500" \
    --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
    -m ee_tuning tune examples/llama-2-70b/job.yaml "$@"
code=$?

# Neither finished nor where it began: it goes on. What failed before its first checkpoint would fail again.
if [ ! -e "$run/exit_heads" ] && [ "$(cat "$run/checkpoints/latest" 2>/dev/null)" != "$before" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
