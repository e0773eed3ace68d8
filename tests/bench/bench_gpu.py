"""Speed on one GPU beside the card's own floors and the peers' figures.

    python tests/bench/bench_gpu.py [--json] [--model llama8b|smol135m|both] [--parts floors,decode,...]
        [--batch-sizes 1,8,64,256] [--arms tier_off,tier_on] [--budgets 768,1024:25] [--rounds 3] [--out FILE]
        [--quick] [--profile] [--device cuda|cpu] [--graphs off] [--page-size 16] ...

Each part runs in a process of its own; random weights in the models' shapes, bf16; the real Scheduler, Engine
and step loop, without Ray and HTTP. Every option of the workers is one here too: `--graphs off` is an
ablation. Progress goes to stderr; one JSON line ends stdout, and is written to --out after every part:

floors      GB/s of reading the card's memory, TFLOP/s of bf16 products, GB/s between host and device
decode      128 in / 128 out, greedy, at batch 1, 8, 64, 256: medians over rounds; tpot_over_floor is over
            (weights + KV read) / read bandwidth
multiturn   64 chats of 5 turns beside 8 steady decodes, host tier off and on; only the 8B shape
moves       LOAD and SAVE bandwidth through mover and arena, processor cores they take, and
            tier_tpot_penalty: inter-token latency of 8 steady decodes beside moves over that without
ratios      beside the best peer's figure, >= 1 is better; `peers` says whose

--quick     small sizes: shows that it works, not how fast. --device cpu rehearses on a tiny model.
"""

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is loaded

import torch  # noqa: E402

from tests.bench import gpu_peers  # noqa: E402
from tests.bench.gpu_shapes import option_names, worker_options  # noqa: E402
from tests.bench.measuring import say  # noqa: E402

PARTS = ("floors", "decode", "multiturn", "moves")
ARMS = ("tier_off", "tier_on")
PART_TIMEOUT_S = 560.0


def runs_of(parts: list[str], models: list[str], arms: list[str]) -> list[tuple[str, str]]:
    """Return (part, what of it) for each process, in order."""
    runs = []
    for part in parts:
        match part:
            case "floors":
                runs.append((part, ""))
            case "decode":
                runs += [(part, model) for model in models]
            case "multiturn":
                if strange := set(arms) - set(ARMS):
                    raise SystemExit(f"no arm {strange.pop()!r}; there are {', '.join(ARMS)}")
                runs += [(part, arm) for arm in arms]
            case "moves":
                runs.append((part, ""))
            case _:
                raise SystemExit(f"no part {part!r}; there are {', '.join(PARTS)}")
    return runs


def run_part(part: str, what: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure in this process. Each returns its own key of the results."""
    device, is_quick = torch.device(arguments.device), arguments.quick
    is_cuda = device.type == "cuda"
    options = {
        "device": device.type,
        "dtype": "bfloat16" if is_cuda else "float32",
        **worker_options(vars(arguments)),
    }
    if not is_cuda:
        torch.set_num_threads(1)
    shape = (what if part == "decode" else "llama8b") if is_cuda else "tiny"
    if part == "floors":
        from tests.bench.gpu_floors import measure_floors

        return {part: rounded(measure_floors(device, is_quick=is_quick))}
    if part == "decode":
        from tests.bench.gpu_decode import measure_decode

        found = measure_decode(
            shape,
            options,
            arguments.read_gb_s,
            num_rounds=1 if is_quick else arguments.rounds,
            batch_sizes=(1, 4) if is_quick else tuple(map(int, arguments.batch_sizes.split(","))),
            num_tokens=16 if is_quick else 128,
            is_profiled=arguments.profile,
        )
        return {part: {what: found}}
    if part == "multiturn":
        from tests.bench.gpu_tiers import Budget, measure_arm

        budgets = [Budget.parse(text) for text in arguments.budgets.split(",") if text]
        return {part: measure_arm(what, shape, options, budgets, is_quick=is_quick)}
    from tests.bench.gpu_moves import measure_moves

    return {part: measure_moves(shape, options, is_quick=is_quick)}


def rounded(found: dict[str, float | str]) -> dict[str, float | str]:
    return {name: round(value, 2) if isinstance(value, float) else value for name, value in found.items()}


def merge(results: dict[str, Any], found: dict[str, Any]) -> None:
    """Add what a part found, arm by arm."""
    for key, value in found.items():
        results[key] = {**results.get(key, {}), **value}
    if "floors" in results and (moves := results.get("moves")):
        for kind, way in (("load", "host_to_device"), ("save", "device_to_host")):
            moves[f"{kind}_over_bulk"] = round(moves[f"{kind}_gb_s"] / results["floors"][f"{way}_gb_s"], 3)


def about(device: str, script: str, arguments: list[str]) -> dict[str, Any]:
    """Return the card, the versions and the command."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("triton", "flashinfer-python"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    card = platform.machine()
    if device == "cuda":  # asked of nvidia-smi: a context here would take memory from what is measured
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader", "--id=0"]
        told = subprocess.run(query, capture_output=True, text=True, check=True, timeout=60).stdout
        card, versions["driver"] = (part.strip() for part in told.split(","))
        versions["cuda"] = str(torch.version.cuda)
    command = " ".join(["python", script, *arguments])
    return {
        "card": card,
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 2),
        "versions": versions,
        "command": command,
    }


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    made.add_argument("--json", action="store_true", help="print the JSON line only, without the table")
    made.add_argument("--model", choices=("llama8b", "smol135m", "both"), default="both")
    made.add_argument("--parts", default=",".join(PARTS), help="which parts to run (default: all)")
    made.add_argument("--batch-sizes", default="1,8,64,256", help="of part decode")
    made.add_argument("--arms", default=",".join(ARMS), help="of part multiturn")
    made.add_argument(
        "--budgets", default="", help="of part multiturn, in turn: TOKENS or TOKENS:MS of a step"
    )
    made.add_argument("--rounds", type=int, default=3, help="of each decode measurement")
    made.add_argument("--out", type=Path, help="also write the JSON line to this file, after every part")
    made.add_argument("--quick", action="store_true", help="small sizes: shows that it works, not how fast")
    made.add_argument("--profile", action="store_true", help="of part decode: which kernels take the time")
    made.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    made.add_argument("--read-gb-s", type=float, help="read bandwidth to hold against, without part floors")
    made.add_argument("--part", help=argparse.SUPPRESS)
    made.add_argument("--of", default="", help=argparse.SUPPRESS)
    for name in option_names():
        made.add_argument(f"--{name.replace('_', '-')}", help=f"as WorkerConfig.{name}", dest=name)
    return made


def main() -> None:
    arguments = parser().parse_args()
    if arguments.part:
        print(json.dumps(run_part(arguments.part, arguments.of, arguments)))
        return
    try:
        worker_options(vars(arguments))
    except ValueError as error:  # before anything runs
        parser().error(str(error))
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser().error("there is no CUDA device; --device cpu --quick rehearses on a tiny model")
    models = ["llama8b", "smol135m"] if arguments.model == "both" else [arguments.model]
    runs = runs_of(arguments.parts.split(","), models, arguments.arms.split(","))
    results = about(arguments.device, "tests/bench/bench_gpu.py", sys.argv[1:])
    for part, what in runs:
        read_gb_s = results.get("floors", {}).get("read_gb_s", arguments.read_gb_s)
        if part == "decode" and read_gb_s is None:
            raise SystemExit("part decode needs part floors before it, or --read-gb-s")
        more = ["--part", part, "--of", what] + (["--read-gb-s", str(read_gb_s)] if read_gb_s else [])
        command = [sys.executable, __file__, *sys.argv[1:], *more]
        run = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=PART_TIMEOUT_S, check=False)
        if run.returncode != 0:
            results.setdefault("failed", []).append(f"{part} {what}: exit {run.returncode}")
        else:
            found = run.stdout.splitlines()[-1]
            say(f"{part} {what}: {found}")
            merge(results, json.loads(found))
        if arguments.device == "cuda" and not arguments.quick:
            results["ratios"], results["peers"] = gpu_peers.ratios(results), gpu_peers.SOURCE
        if arguments.out:
            arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    if not arguments.json:
        print(json.dumps(results, indent=1))
    print(json.dumps(results))
    if "failed" in results:
        raise SystemExit("; ".join(results["failed"]))


if __name__ == "__main__":
    main()
