"""LOADs and SAVEs by themselves, and steady decodes beside them: mover, arena and board in one process."""

import statistics
import tempfile
from pathlib import Path
from typing import Any

from tests.bench.gpu_rank import shape_config
from tests.bench.kv_decode import Decode, DecodeSetup
from tests.bench.measuring import say

RATE = 4e9
"""Bytes a second of LOADs, and of SAVEs: what the multi-turn workload moves at most."""
PROMPT_LEN = 256
NUM_REQUESTS = 8
NUM_MOVED = 1_024
"""Pages of each kind: 2 GiB of the 8B shape's."""
ARMS = {"load_first": ("load",), "load": ("load",), "save": ("save",), "both": ("load", "save")}
"""load_first: no page was verified before."""


def measure_moves(shape: str, options: dict[str, Any], *, is_quick: bool) -> dict[str, Any]:
    """Return GB/s and processor cores of each arm, and tier_tpot_penalty with what is behind it."""
    num_moved, num_stretches = (32, 2) if is_quick else (NUM_MOVED, 24)
    defaults = {"max_running_requests": NUM_REQUESTS, "max_tokens_per_step": NUM_REQUESTS * PROMPT_LEN}
    num_tokens = PROMPT_LEN + (2 * num_stretches + 4) * 10
    with tempfile.TemporaryDirectory() as folder:
        config = shape_config(Path(folder), shape, defaults | options)
        setup = DecodeSetup(
            config,
            rate=RATE,
            num_requests=NUM_REQUESTS,
            prompt_len=PROMPT_LEN,
            num_request_pages=NUM_REQUESTS * (num_tokens // config.page_size + 2),
            num_moved=num_moved,
            verify=config.verify_pages,
        )
        with Decode(setup) as decode:
            found: dict[str, Any] = {"move_gb": 0.0}
            for arm, kinds in ARMS.items():
                rounds = [decode.traffic.move_all(*kinds) for _ in range(1 if arm == "load_first" else 5)]
                num_bytes = rounds[0][0]
                seconds = statistics.median(seconds for _, seconds, _ in rounds)
                cores = statistics.median(cpu_s / seconds for _, seconds, cpu_s in rounds)
                found |= {
                    f"{arm}_gb_s": round(num_bytes / seconds / 1e9, 2),
                    f"{arm}_cores": round(cores, 2),
                    "move_gb": round(num_bytes / len(kinds) / 1e9, 2),
                }
                say(f"{arm}: {found[f'{arm}_gb_s']} GB/s, {found[f'{arm}_cores']} cores")
            figures = decode.measure(num_stretches)
    found["tier_tpot_penalty"] = figures.pop("decode_penalty")
    return found | figures
