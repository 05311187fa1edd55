#!/usr/bin/env bash
# Everything that wants a GPU: the tests marked for one, then the benchmarks whose figures it changes.
# A part that fails, or takes over five minutes, is named and the rest go on; the exit code is then 1.
set -uo pipefail
cd "$(dirname "$0")/.."
failed=0
try() {
    echo "== $*"
    local start=$SECONDS
    timeout 300 "$@" || { failed=1 && echo "failed: $*"; }
    echo "== $((SECONDS - start)) s"
}
try python3 -m pytest -o addopts=-q -m gpu --continue-on-collection-errors
try python3 -m benchmarks.step --shapes 64,3,32,32 128,3,256,256
try python3 -m benchmarks.sample
try python3 -m benchmarks.sample --network 128 --dtype bfloat16 --batch 128 --rounds 5
try python3 -m benchmarks.unet --channels 128 --batch 128
try python3 -m benchmarks.loop
try python3 -m benchmarks.gpt_train
try python3 -m benchmarks.gpt_generate
try python3 -m benchmarks.vae
try python3 -m benchmarks.latent --channels 128
exit $failed
