#!/usr/bin/env bash
# A short storm under compute-sanitizer's memcheck: buffers outside the KV pool. Wrong pages inside it are the KV
# sanitizer's and --checked's part. PYTHON names the interpreter; further arguments go to storm.py.
#
# 1. Every allocation is the driver's own, so that a step over its end is one: eager, as captures need the cache.
# 2. With the caching allocator, graphs captured and replayed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=${PYTHON:-.venv/bin/python}
storm=(tests/gpu/storm.py --shape small --rounds 1 --requests 48 --concurrency 16 --max-prompt-len 120
    --round-timeout-s 400 --injection off --page-size 16 --max-tokens-per-step 256)
# Only this process: the cache server's has no CUDA.
memcheck=(compute-sanitizer --tool memcheck --target-processes application-only --error-exitcode 9)

echo 'memcheck: no caching allocator, eager'
# Without the cache, and with every access checked, a step takes a hundred times as long.
PYTORCH_NO_CUDA_MEMORY_CACHING=1 "${memcheck[@]}" "$python" "${storm[@]}" --graphs off \
    --requests 16 --concurrency 8 --max-prompt-len 60 "$@"
echo 'memcheck: graphs'
"${memcheck[@]}" "$python" "${storm[@]}" --first-round 1 "$@"
