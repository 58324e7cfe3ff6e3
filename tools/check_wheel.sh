#!/usr/bin/env bash
# Builds sdist and wheel into dist/, checks what an index would refuse, and tries the wheel in a clean venv, away from the sources:
#   bash tools/check_wheel.sh [SITE-PACKAGES]
# With a folder of installed packages nothing but the wheel itself is installed; without, its dependencies come from the package index.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

python3 -m venv "$scratch/tools"
"$scratch/tools/bin/python" -m pip install --quiet --disable-pip-version-check build twine
rm -rf dist
"$scratch/tools/bin/python" -m build --outdir dist .
"$scratch/tools/bin/python" -m twine check --strict dist/*

python3 -m venv "$scratch/clean"
no_deps=()
[ $# -eq 0 ] || no_deps=(--no-deps)
"$scratch/clean/bin/python" -m pip install --quiet --disable-pip-version-check "${no_deps[@]}" dist/*.whl
[ $# -eq 0 ] || echo "$1" > "$(echo "$scratch"/clean/lib/python3.*/site-packages)/dependencies.pth"

# The demo's first steps. The shipped model lies in the sdist and not in the wheel.
tar --extract --gzip --file dist/*.tar.gz --directory "$scratch"
cd "$scratch"/ee_tuning-*/examples
unset PYTHONPATH
run() { "$scratch/clean/bin/ee-tuning" "$@"; }
case "$("$scratch/clean/bin/python" -c 'import ee_tuning; print(ee_tuning.__file__)')" in
    "$scratch"/clean/*) ;;
    *) echo "check_wheel.sh: another ee_tuning than the wheel's is imported" >&2; exit 1 ;;
esac
run --version
run convert --model tiny-python-llama --exit-layers 3,6 --output "$scratch/exits"
run tune --model tiny-python-llama --exits "$scratch/exits" --data ../ee_tuning/config --train-iters 2 --seq-length 64 --micro-batch-size 1 \
    --global-batch-size 2 --set tuning.eval_iters=0 --output "$scratch/run"
run generate --model tiny-python-llama --exits "$scratch/run/exit_heads" --threshold 0.8 --max-new-tokens 8 --prompt "def main("
run verify "$scratch/run"
echo "the wheel works"
