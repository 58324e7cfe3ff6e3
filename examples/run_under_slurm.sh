#!/usr/bin/env bash
# The body of every slurm.sh: bash examples/run_under_slurm.sh JOB [FLAGS OF tune]
# srun starts the processes, and no torchrun between: its exit code is then the highest of theirs, 75 where the run saved and wants to come again.
# Their ranks and where they meet are read from what srun sets (ee_tuning/parallel/launcher.py).
set -uo pipefail
job=$1
shift

# When a node dies, the processes of the others end within seconds. Slurm takes the job back (--requeue) once it has missed the node for
# SlurmdTimeout, and only a job that still runs: srun waits longer than that.
missed_after=$(scontrol show config | sed -n 's/^SlurmdTimeout *= *\([0-9]*\) sec.*/\1/p')

# SIGUSR1, minutes before the time is up (--signal of slurm.sh), has the run save at the end of its step and leave. A process that ends does
# not take the others along at once: they are leaving, too. Where one failed, those that hang are ended.
srun --kill-on-bad-exit=0 --wait=$((${missed_after:-300} + 120)) --distribution=block --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
    python -m ee_tuning tune "$job" "$@"
code=$?

if [ $code -eq 75 ]; then  # tuning.stop_exit_code
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
