#!/usr/bin/env bash
# Wheels for a machine with a GPU, Python 3.12, torch and transformers, and no package index: into .whl, which travels with the repository
# (docs/gpu.md). What such a machine mostly lacks of what setup.py asks for is megatron-core; torchao and bitsandbytes serve backbones in 8
# and 4 bits. Other packages, each as NAME==VERSION, can be named in their place.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ $# -gt 0 ] || set -- megatron-core==0.16.1 torchao==0.18.0 bitsandbytes==0.50.2
mkdir -p .whl
rm -f .whl/*.whl
platforms=(--platform manylinux2014_x86_64)
for version in 2_28 2_24 2_17; do platforms+=(--platform "manylinux_${version}_x86_64"); done
"${PYTHON:-python3}" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp "${platforms[@]}" \
  --dest .whl "$@"

# bitsandbytes brings a library for every CUDA, ROCm and XPU, 129 MB; those for CUDA 13.0 and for the CPU are 4.
"${PYTHON:-python3}" - .whl/bitsandbytes-*.whl <<'PYTHON'
import sys, zipfile
from pathlib import Path

for path in filter(Path.exists, map(Path, sys.argv[1:])):
    with zipfile.ZipFile(path) as whole:
        left_out = {name for name in whole.namelist() if "/libbitsandbytes_" in name and not name.endswith(("_cuda130.so", "_cpu.so"))}
        with zipfile.ZipFile(path.with_suffix(".partial"), "w", zipfile.ZIP_DEFLATED) as slim:
            for item in whole.infolist():
                content = whole.read(item)
                if item.filename.endswith(".dist-info/RECORD"):
                    content = b"".join(line for line in content.splitlines(True) if line.split(b",")[0].decode() not in left_out)
                if item.filename not in left_out:
                    slim.writestr(item, content)
    path.with_suffix(".partial").replace(path)
PYTHON
ls -l .whl
