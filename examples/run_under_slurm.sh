#!/usr/bin/env bash
# The body of every slurm.sh: bash examples/run_under_slurm.sh JOB [FLAGS OF tune]
# srun starts the processes, and no torchrun between: its exit code is then the highest of theirs, 75 where the run saved and wants to come again.
set -uo pipefail
job=$1
shift
export MASTER_ADDR MASTER_PORT=29500
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# SIGUSR1, minutes before the time is up (--signal of slurm.sh), has the run save at the end of its step and leave. A process that ends does
# not take the others along at once: they are leaving, too. Where one failed, those that hang are ended.
srun --kill-on-bad-exit=0 --wait=300 --distribution=block --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
    bash -c 'export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS; exec python -m ee_tuning tune "$@"' tune \
    "$job" "$@"
code=$?

if [ $code -eq 75 ]; then  # tuning.stop_exit_code
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
