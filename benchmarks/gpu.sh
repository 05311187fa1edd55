#!/usr/bin/env bash
# All benchmarks and tests that need a GPU, in calls of under nine minutes: see benchmarks/gpu.py.
cd "$(dirname "$0")/.." && exec python3 -m benchmarks.gpu "$@"
