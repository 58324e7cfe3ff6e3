#!/usr/bin/env bash
# On every node, from the repository's root: NODE_RANK=0 MASTER_ADDR=first-node bash examples/llama-3.1-70b/torchrun.sh
# Flags go through to `tune`: --model FOLDER, --data PATH, --dry-run, …  The same command again goes on where the run was stopped.
set -euo pipefail
exec torchrun --nnodes 2 --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port 29500 --nproc-per-node 8 \
    --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
    -m ee_tuning tune examples/llama-3.1-70b/job.yaml "$@"
