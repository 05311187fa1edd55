#!/usr/bin/env bash
# Everything that wants a GPU: the tests marked for one, then the benchmarks whose figures it changes.
set -euo pipefail
cd "$(dirname "$0")/.."
python -m pytest -o addopts=-q -m gpu
python -m benchmarks.step --shapes 64,3,32,32 128,3,256,256
python -m benchmarks.sample
python -m benchmarks.sample --network 128 --dtype bfloat16 --batch 128 --rounds 5
python -m benchmarks.unet --channels 128 --batch 128
python -m benchmarks.loop
python -m benchmarks.gpt_train
python -m benchmarks.gpt_generate
python -m benchmarks.vae
python -m benchmarks.latent --channels 128
