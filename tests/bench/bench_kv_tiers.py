"""The cache tier's speed and memory, each figure beside what it is measured against.

    python tests/bench/bench_kv_tiers.py [--json] [--quick] [--parts moves,wire]

Each part runs in a process of its own, one after another; within it the arms take turns, and figures are
medians over rounds. Progress goes to stderr, one JSON line ends stdout:

save_ratio_*, load_ratio_*  pages of 1 MiB and 256 KiB through PageMover, arena and board, always verified:
                            throughput over that of a memory copy of the same pages by as many threads.
                            *_cpu: the same of processor time, which holds on busy cores as well
fetch_ratio_*               128 pages out of a peer's arena, leased, verified and committed, beside Mooncake's
                            TransferEngine by itself reading as many bytes over loopback
ttft_hit_over_miss_*        time to the first token after 2,064 of SmolLM2-135M in bf16, 2,048 of them cached
                            in the node's arena (host), a peer's (peer) or Mooncake Store (store), over that
                            of computing all; miss_prefill_ratio: that arm's tokens/s over bench_cpu's
decode_penalty              inter-token latency of 8 steady decodes beside 500 MB/s of SAVE and 500 MB/s of
                            LOAD, over the same without; save_mb_s, load_mb_s: the rates that came of it
broadcast_p99_ms            from a worker's commit until each of 8 subscribed processes has the page
server_bytes_per_page       what a page adds to the CacheServer's own memory; server_fixed_mb: what it has
                            besides: its log of changes, mostly
recovery_s                  from kill -9 of the server of a 2 GB arena until a worker holds grants of the next
                            one and hears of all pages again
load                        load average of the machine before the run: what else it was doing
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.bench.measuring import cpu_name  # noqa: E402

NUM_CORES = len(os.sched_getaffinity(0))
THREAD_ENVIRONMENT = {
    "OMP_NUM_THREADS": str(NUM_CORES),
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "300",
}
"""As the launcher sets for workers."""
PARTS = ("moves", "decode", "wire", "ttft", "server")
PART_TIMEOUT_S = 900.0
MIB = 1 << 20


def run_part(part, is_quick):
    match part:
        case "moves":
            from tests.bench.kv_moves import measure_moves

            return measure_moves(3 if is_quick else 15, (64 if is_quick else 256) * MIB)
        case "decode":
            from tests.bench.kv_decode import measure_decode

            return measure_decode(4 if is_quick else 24)
        case "wire":
            from tests.bench.kv_wire import measure_wire

            return measure_wire(3 if is_quick else 15)
        case "ttft":
            from tests.bench.kv_ttft import measure_ttft

            return measure_ttft(1 if is_quick else 5)
        case "server":
            from tests.bench.kv_server import measure_server

            return measure_server(*((50, 8_000, 0.25) if is_quick else (500, 160_000, 2.0)))
    raise ValueError(f"no part {part!r}; there are {', '.join(PARTS)}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the JSON line only, without the table")
    parser.add_argument("--quick", action="store_true", help="small sizes: shows that it works, not how fast")
    parser.add_argument("--parts", default=",".join(PARTS), help="which parts to run (default: all)")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        print(json.dumps(run_part(arguments.part, arguments.quick)))
        return
    results = {"load": round(os.getloadavg()[0], 2), "cores": NUM_CORES, "cpu": cpu_name()}
    for part in arguments.parts.split(","):
        command = [sys.executable, __file__, "--part", part, *(["--quick"] if arguments.quick else [])]
        run = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | THREAD_ENVIRONMENT,
            timeout=PART_TIMEOUT_S,
            check=True,
        )
        found = run.stdout.splitlines()[-1]
        print(f"{part}: {found}", file=sys.stderr, flush=True)
        results |= json.loads(found)
    if not arguments.json:
        for name, value in results.items():
            print(f"{name:24} {value}")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
