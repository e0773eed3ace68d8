"""Speed of a model divided among the GPUs of one host, beside one GPU in the same run and the peer's figures.

    python tests/bench/bench_tp.py [--json] [--tp-sizes 1,2] [--models llama8b,llama70b] [--out FILE]
        [--parts all_reduce,plans,decode,multiturn] [--batch-sizes 1,8,64,256] [--rounds 3] [--profile]
        [--quick] [--device cuda|cpu] [--graphs off] ...

Each part runs in a process of its own, and each rank beyond the first in one with a card of its own; random
weights in the models' shapes, bf16; the real Scheduler, Engine and step loops over NCCL, without Ray and
HTTP. Every option of the workers is one here too. `--tp-sizes 1,2,4,8` is all that more GPUs need. Progress
goes to stderr; one JSON line ends stdout, and is written to --out after every part:

all_reduce  microseconds of one captured all-reduce by bytes, for NCCL and for the ranks' own kernel
plans       microseconds from rank 0 to the followers, by the plan's bytes
decode      by model and ranks: 128 in / 128 out, greedy, at each batch size: medians over rounds;
            all_reduce_share is of the time that rank 0's device works in decode steps, and counts what it
            waits for the other ranks, and where the ranks' own kernel sums, the norm behind the sum
multiturn   64 chats of 5 turns beside 8 steady decodes with the host tier, on the most ranks; 8B shape
scaling     of_one_rank: TPOT over that of one rank, and efficiency: 1 / (ranks x of_one_rank)
ratios      tokens/s beside the peer's on two of the same cards, >= 1 is better; `peers` says whose

--quick     small sizes: shows that it works, not how fast. --device cpu rehearses on a tiny model over gloo.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is loaded

import torch  # noqa: E402

from tests.bench.bench_gpu import PART_TIMEOUT_S, about, merge  # noqa: E402
from tests.bench.gpu_peers import TP_SOURCE, tp_ratios  # noqa: E402
from tests.bench.gpu_shapes import SHAPES, option_names, worker_options  # noqa: E402
from tests.bench.measuring import say  # noqa: E402

PARTS = ("all_reduce", "plans", "decode", "multiturn")


def runs_of(parts: list[str], models: list[str], tp_sizes: list[int]) -> list[tuple[str, str, int]]:
    """Return (part, model, ranks) for each process, in order."""
    runs = []
    for part in parts:
        if part not in PARTS:
            raise SystemExit(f"no part {part!r}; there are {', '.join(PARTS)}")
        if part == "decode":
            runs += [(part, model, tp_size) for model in models for tp_size in tp_sizes]
        elif max(tp_sizes) > 1:
            runs.append((part, "llama8b", max(tp_sizes)))
    return runs


def run_part(part: str, model: str, tp_size: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure in this process. Each returns its own key of the results."""
    is_cuda, is_quick = arguments.device == "cuda", arguments.quick
    options = {
        "device": arguments.device,
        "dtype": "bfloat16" if is_cuda else "float32",
        **worker_options(vars(arguments)),
        "tp_size": tp_size,
    }
    if not is_cuda:
        torch.set_num_threads(1)
    shape = model if is_cuda else "tiny"
    if part == "all_reduce":
        from tests.bench.all_reduce import measure_all_reduce

        return {part: measure_all_reduce(tp_size, arguments.device, is_quick=is_quick)}
    if part == "plans":
        from tests.bench.plan_latency import measure_plans

        return {part: measure_plans(tp_size, arguments.device, is_quick=is_quick)}
    if part == "decode":
        from tests.bench.gpu_decode import measure_decode

        found = measure_decode(
            shape,
            options,
            arguments.read_gb_s,
            num_rounds=1 if is_quick else arguments.rounds,
            batch_sizes=(1, 4) if is_quick else tuple(map(int, arguments.batch_sizes.split(","))),
            num_tokens=16 if is_quick else 128,
            is_profiled=True,
            told=lambda found: keep(arguments.out, {part: {model: {f"tp{tp_size}": found}}}),
        )
        for figures in (each for each in found.values() if isinstance(each, dict) and not arguments.profile):
            del figures["profile"]["kernels"]
        return {part: {model: {f"tp{tp_size}": found}}}
    from tests.bench.gpu_tiers import measure_arm

    return {part: {f"tp{tp_size}": measure_arm("tier_on", shape, options, [], is_quick=is_quick)["tier_on"]}}


def keep(out: Path | None, found: dict[str, Any]) -> None:
    """Write what a part has found so far beside --out: all there is of it if its time runs out."""
    if out is not None:
        out.with_suffix(".part").write_text(json.dumps(found) + "\n")


def scaling(decode: dict[str, Any]) -> dict[str, Any]:
    """Return what more ranks bring over one, by model, ranks and batch."""
    found: dict[str, Any] = {}
    for model, by_ranks in decode.items():
        one = by_ranks.get("tp1")
        for ranks, figures in by_ranks.items():
            num_ranks = int(ranks.removeprefix("tp"))
            if one is None or num_ranks == 1:
                continue
            for batch in (name for name in figures if name in one and name[1:].isdigit()):
                ratio = figures[batch]["tpot_ms"] / one[batch]["tpot_ms"]
                found.setdefault(model, {}).setdefault(ranks, {})[batch] = {
                    "of_one_rank": round(ratio, 3),
                    "efficiency": round(1 / (num_ranks * ratio), 3),
                }
    return found


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    made.add_argument("--json", action="store_true", help="print the JSON line only, without the table")
    made.add_argument("--tp-sizes", default="1,2", help="numbers of ranks to compare, a GPU each")
    made.add_argument("--models", default="llama8b,llama70b", help=f"of part decode: {', '.join(SHAPES)}")
    made.add_argument("--parts", default=",".join(PARTS), help="which parts to run (default: all)")
    made.add_argument("--batch-sizes", default="1,8,64,256", help="of part decode")
    made.add_argument("--rounds", type=int, default=3, help="of each decode measurement")
    made.add_argument("--out", type=Path, help="also write the JSON line to this file, after every part")
    made.add_argument("--add-to", type=Path, help="a file of --out of the same cards, to go on from")
    made.add_argument("--quick", action="store_true", help="small sizes: shows that it works, not how fast")
    made.add_argument("--profile", action="store_true", help="of part decode: which kernels take the time")
    made.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    made.add_argument("--read-gb-s", type=float, default=3_000.0, help="a card's, for the floors of decode")
    made.add_argument("--part", help=argparse.SUPPRESS)
    made.add_argument("--of", help=argparse.SUPPRESS)
    for name in option_names():
        made.add_argument(f"--{name.replace('_', '-')}", help=f"as WorkerConfig.{name}", dest=name)
    return made


def main() -> None:
    arguments = parser().parse_args()
    if arguments.part:
        model, tp_size = arguments.of.split(":")
        print(json.dumps(run_part(arguments.part, model, int(tp_size), arguments)))
        return
    try:
        worker_options(vars(arguments))
    except ValueError as error:  # before anything runs
        parser().error(str(error))
    sizes, models = arguments.tp_sizes.split(","), arguments.models.split(",")
    if not all(size.isdecimal() and int(size) for size in sizes):
        parser().error(f"--tp-sizes {arguments.tp_sizes}: numbers of ranks from 1 on, separated by commas")
    if unknown := set(models) - set(SHAPES):
        parser().error(f"--models {arguments.models}: no {', '.join(unknown)}; there are {', '.join(SHAPES)}")
    tp_sizes = [int(size) for size in sizes]
    if arguments.device == "cuda" and torch.cuda.device_count() < max(tp_sizes):
        parser().error(
            f"--tp-sizes {arguments.tp_sizes}: there are {torch.cuda.device_count()} CUDA devices; --device"
            " cpu --quick rehearses on a tiny model"
        )
    results = about(arguments.device, "tests/bench/bench_tp.py", sys.argv[1:])
    results["num_cards"] = max(tp_sizes) if arguments.device == "cuda" else 0
    if arguments.add_to:
        before = json.loads(arguments.add_to.read_text())
        assert before["card"] == results["card"], "measured on other cards"
        results = before | results | {"command": f"{before['command']}; {results['command']}"}
    for part, model, tp_size in runs_of(arguments.parts.split(","), models, tp_sizes):
        name = f"{part} {model} on {tp_size}"
        command = [sys.executable, __file__, *sys.argv[1:], "--part", part, "--of", f"{model}:{tp_size}"]
        try:
            run = subprocess.run(
                command, stdout=subprocess.PIPE, text=True, timeout=PART_TIMEOUT_S, check=True
            )
        except subprocess.SubprocessError as error:
            results.setdefault("failed", []).append(f"{name}: {error}")
        else:
            found = run.stdout.splitlines()[-1]
            say(f"{name}: {found}")
            if part == "decode":
                results.setdefault(part, {})
                merge(results[part], json.loads(found)[part])
                results["scaling"] = scaling(results[part])
            else:
                merge(results, json.loads(found))
        if arguments.device == "cuda" and not arguments.quick:
            results["ratios"], results["peers"] = tp_ratios(results), TP_SOURCE
        if arguments.out:
            arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    if not arguments.json:
        print(json.dumps(results, indent=1))
    print(json.dumps(results))
    if "failed" in results:
        raise SystemExit("; ".join(results["failed"]))


if __name__ == "__main__":
    main()
