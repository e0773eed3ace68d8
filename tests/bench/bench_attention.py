"""FlashInfer's paged kernels over our pool: decode, chunks and both, beside the card's floor.

    python tests/bench/bench_attention.py [--json] [--models llama8b,smol135m]

bf16, pages of 16, plans as eager steps have them; times are of graph replays of one layer's attention, by
the card's clock, over layers in turn. Progress goes to stderr; the last line of stdout is JSON:

read_gb_s   the card's read bandwidth
decode      by model, batch and context: microseconds by the kernels we use (`short`) and by the library's
            CUDA-core kernels (`cuda_cores`, where they know the heads), and `floor`, the reading of the KV
chunk       by model, chunk and context: microseconds by kernels for `long` rows, and for `short` ones
mixed       40 decodes beside a chunk: planned apart (`apart`), or all as short rows (`together`)
plan_us     by model and batch: what planning a decode step costs the host
"""

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from tests.bench.kernel_timing import read_bytes_per_s, seconds_per_call  # noqa: E402
from tests.bench.measuring import say  # noqa: E402
from tests.gpu.cuda_rows import CUDA, CudaRows  # noqa: E402
from workers.attention.flashinfer import FlashInferAttention  # noqa: E402
from workers.attention.flashinfer_kernels import FlashInferKernels, HeadShape  # noqa: E402
from workers.engine.copies import CudaCopies  # noqa: E402

MODELS = {"llama8b": (32, 8, 128), "smol135m": (9, 3, 64)}
BATCHES, CONTEXTS = (1, 8, 64, 256), (256, 2048, 8192)
CHUNKS, MAX_BYTES = (128, 512, 1024), 20 << 30
PAGE_SIZE, MIN_BYTES, MAX_LAYERS = 16, 192 << 20, 32
CUDA_CORE_GROUPS = (1, 2, 3, 4, 8)


class ShortOnly(FlashInferKernels):
    """The library on a card without kernels for long rows."""

    def long(self, window):
        return None


def rows_of(heads, context_lens, query_lens):
    num_heads, num_kv_heads, head_dim = heads
    kv_bytes = sum(context_lens) * 2 * num_kv_heads * head_dim * 2
    num_layers = max(2, min(MAX_LAYERS, -(-MIN_BYTES // kv_bytes)))
    if num_layers * kv_bytes > MAX_BYTES:
        return None, kv_bytes
    rows = CudaRows(
        context_lens,
        query_lens,
        page_size=PAGE_SIZE,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        num_layers=num_layers,
    )
    for index in range(num_layers):
        for half in rows.pool.layer(index):
            half.normal_()
    return rows, kv_bytes


def planned(rows, library=FlashInferKernels):
    own = rows.layer
    shape = HeadShape(own.num_heads, own.num_kv_heads, own.head_dim, PAGE_SIZE, torch.bfloat16)
    attention = FlashInferAttention(
        rows.pool,
        [own],
        library(shape, [None], CUDA),
        CudaCopies(CUDA),
        max_rows=rows.batch.num_rows,
        max_tokens=rows.batch.num_tokens,
    )
    attention.plan(rows.batch)
    attention.begin()
    return attention


def attention_us(rows, attention):
    """Time the attention of one layer, without writing its keys."""
    layers = [replace(rows.layer, index=index) for index in range(rows.pool.num_layers)]
    q = rows.q.contiguous()
    return 1e6 * seconds_per_call([lambda layer=layer: attention._attend(layer, q) for layer in layers])


def cuda_cores_us(rows):
    import flashinfer

    own, batch = rows.layer, rows.batch
    if own.num_heads // own.num_kv_heads not in CUDA_CORE_GROUPS:
        return None
    attention = planned(rows)
    pages, num_rows = attention._pages, batch.num_rows
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        torch.zeros(256 << 20, dtype=torch.uint8, device=CUDA),
        use_cuda_graph=True,
        paged_kv_indptr_buffer=torch.zeros(num_rows + 1, dtype=torch.int32, device=CUDA),
        paged_kv_indices_buffer=torch.zeros_like(pages.pages),
        paged_kv_last_page_len_buffer=torch.zeros(num_rows, dtype=torch.int32, device=CUDA),
    )
    wrapper.plan(
        pages.starts.cpu(),
        pages.pages[: int(pages.starts[-1])],
        pages.last_page_lens.cpu(),
        own.num_heads,
        own.num_kv_heads,
        own.head_dim,
        PAGE_SIZE,
        q_data_type=torch.bfloat16,
        sm_scale=own.scale,
    )
    q, out = rows.q.contiguous(), torch.empty_like(rows.q, memory_format=torch.contiguous_format)
    pools = [rows.pool.layer(index) for index in range(rows.pool.num_layers)]
    calls = [lambda pool=pool: wrapper.run(q, pool, out=out) for pool in pools]
    return 1e6 * seconds_per_call(calls)


def plan_us(rows, attention):
    for _ in range(20):
        attention.plan(rows.batch)
    torch.cuda.synchronize()
    started_s = time.perf_counter()
    for _ in range(100):
        attention.plan(rows.batch)
    return 1e4 * (time.perf_counter() - started_s)


def measure(name, found, rate):
    heads = MODELS[name]
    for batch in BATCHES:
        for context in CONTEXTS:
            rows, kv_bytes = rows_of(heads, [context] * batch, [1] * batch)
            if rows is None:
                continue
            attention = planned(rows)
            arms = {"short": attention_us(rows, attention), "cuda_cores": cuda_cores_us(rows)}
            tell(found, "decode", (name, batch, context), {**arms, "floor": 1e6 * kv_bytes / rate})
            if context == CONTEXTS[0]:
                tell(found, "plan_us", (name, batch), plan_us(rows, attention))
    for chunk in CHUNKS:
        for context in CONTEXTS:
            rows, _ = rows_of(heads, [context + chunk], [chunk])
            arms = {
                arm: attention_us(rows, planned(rows, by))
                for arm, by in (("long", FlashInferKernels), ("short", ShortOnly))
            }
            tell(found, "chunk", (name, chunk, context), arms)
    for context in CONTEXTS:
        rows, _ = rows_of(heads, [context] * 40 + [context + 512], [1] * 40 + [512])
        arms = {
            "apart": attention_us(rows, planned(rows)),
            "together": attention_us(rows, planned(rows, ShortOnly)),
        }
        tell(found, "mixed", (name, context), arms)


def tell(found, part, key, value):
    found.setdefault(part, {})["/".join(map(str, key))] = value
    say(f"{part} {key}: {value}")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--models", default=",".join(MODELS))
    options = parser.parse_args()
    rate = read_bytes_per_s()
    found = {"card": torch.cuda.get_device_name(), "read_gb_s": rate / 1e9}
    with torch.inference_mode():
        for name in options.models.split(","):
            measure(name, found, rate)
    if options.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
