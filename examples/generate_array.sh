#!/usr/bin/env bash
# Completes a file of prompts by an array of jobs, each task its share:
#   sbatch --array=0-7 examples/generate_array.sh prompts.jsonl completions --model FOLDER --exits FOLDER [FLAGS OF generate]
#   cat completions/share-*.jsonl > completions.jsonl    # in the order of the prompts
# A task that failed is repeated with `scontrol requeue JOB_TASK`, and goes on in its file.
#SBATCH --job-name=generate
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%A_%a.log
set -euo pipefail
prompts=$1 folder=$2
shift 2
if [ "${SLURM_ARRAY_TASK_MIN:-}" != 0 ] || [ "$SLURM_ARRAY_TASK_COUNT" -ne $((SLURM_ARRAY_TASK_MAX + 1)) ]; then
    echo "generate_array.sh: shares are counted from 0: sbatch --array=0-N, got ${SLURM_ARRAY_TASK_MIN:-none} to ${SLURM_ARRAY_TASK_MAX:-none}" >&2
    exit 2
fi
share=$(printf "%s/share-%05d" "$folder" "$SLURM_ARRAY_TASK_ID")
mkdir -p "$folder"
split --number="l/$((SLURM_ARRAY_TASK_ID + 1))/$SLURM_ARRAY_TASK_COUNT" "$prompts" > "$share.prompts"  # whole lines
if [ ! -s "$share.prompts" ]; then
    echo "generate_array.sh: there are more tasks than prompts, and this one has none" >&2
    exit 0
fi
exec python -m ee_tuning generate --prompts "$share.prompts" --output "$share.jsonl" "$@"
