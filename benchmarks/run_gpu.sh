#!/usr/bin/env bash
# Builds, tests and measures on a machine with a GPU, in one go and within nine minutes. Results go to $1.
# Needs torch for CUDA, nvcc, and the build tools of pyproject.toml already installed.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-benchmarks/results}
mkdir -p "$out"
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | tee "$out/gpu.txt"
FASTDLLM_CUDA=ON timeout 240 python -m pip install -q --no-build-isolation --no-deps -e . || exit 1
python -m fastdllm_ext env --json | tee "$out/env.json"
status=0
timeout 120 python -m pytest -m cuda --junitxml "$out/pytest-cuda.xml" || status=1
timeout 60 python benchmarks/ops.py --device cuda --out "$out/ops-cuda.json" || status=1
timeout 200 python -m pytest -m "not cuda" --junitxml "$out/pytest-rest.xml" || status=1
exit $status
