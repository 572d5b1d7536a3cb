#!/usr/bin/env bash
# Run everything that wants a GPU, from a bare checkout, with the Python and the torch that are there.
#
#   bash benchmarks/gpu.sh --out DIR [--device cuda|cpu] [--seconds 540] [--shapes default]
#                          [--only smoke,sweep,tests,bench,check,profile,sanitizer]
#
# benchmarks/gpu_run.py runs the parts, benchmarks/gpu_parts.py lists them. PYTHON chooses another Python than python3.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) || exit 2
export PYTHONPATH="$root:$root/kernels${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
exec "${PYTHON:-python3}" -m benchmarks.gpu_run "$@"
