#!/usr/bin/env bash
# From the repository's root: bash examples/llama-2-70b/torchrun.sh
# Flags go through to `tune`: --model FOLDER, --data PATH, --dry-run, …  The same command again goes on where the run was stopped.
set -euo pipefail
exec torchrun --standalone --nproc-per-node 8 \
    --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
    -m ee_tuning tune examples/llama-2-70b/job.yaml "$@"
