#!/usr/bin/env bash
# Everything that wants a GPU: the tests marked for one, then the benchmarks whose figures it changes.
set -euo pipefail
cd "$(dirname "$0")/.."
python -m pytest -m gpu
python -m benchmarks.step --shapes 64,3,32,32 128,3,256,256
python -m benchmarks.sampling
python -m benchmarks.loop
