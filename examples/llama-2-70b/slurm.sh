#!/usr/bin/env bash
# From the repository's root, on a file system that all nodes see: sbatch examples/llama-2-70b/slurm.sh [--model FOLDER] [--data PATH] …
#SBATCH --job-name=llama-2-70b-exits
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
exec bash examples/run_under_slurm.sh examples/llama-2-70b/job.yaml "$@"
