"""The CUDA kernels beside torch's own and the card's floor.

    python tests/bench/bench_kernels.py [--json] [--out FILE] [--parts kernels,steps]
        [--models llama8b,llama8b_half,smol135m] [--batches 1,8,64,256]

Random bf16 inputs in the models' shapes, in turns over more memory than the caches hold; times are of graph
replays, by the card's clock. Progress goes to stderr; one JSON line ends stdout, and is written to --out
after every part:

read_gb_s   the card's read bandwidth, the best of three ways
kernels     by model, batch and kernel: microseconds of each arm (`ours`, `torch`, ...), `floor`, the time in
            which the card reads as many bytes, and each arm's `errors`: relative to the result in float64.
            Outputs hold NaN before. What is wrong is not timed, named in `failed`, and ends with exit code 1
steps       by model, batch and arm: milliseconds of a decode step without attention, with everything on,
            with one switch off, and by the layers' torch code
tune        (only by --parts) by model, product and batch up to 64: ways to divide it, the best first, the
            chosen, and torch by both of its libraries
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import triton  # noqa: E402

from tests.bench.kernel_timing import num_sets, read_bytes_per_s, seconds_per_call  # noqa: E402
from tests.bench.measuring import say  # noqa: E402
from tests.bench.timed_cases import CUDA, DTYPE, MODELS, timed_cases  # noqa: E402
from workers.triton_kernels.choice import cuda_kernels  # noqa: E402
from workers.triton_kernels.skinny_matmul import MAX_FAST_ROWS  # noqa: E402

PARTS = ("kernels", "steps", "tune")
MAX_ERROR = 2**-7
"""Of the norm of the difference over that of the result: roundings to bf16."""


def errors_of(case):
    """Return each arm's relative error over fresh inputs; 1.0 is a wrong index."""
    found = {}
    for name, arm in (case.checked or case.arms).items():
        inputs, again = case.inputs(77), case.inputs(77)  # an arm may change its own
        exact = case.exact(**again)
        torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty's memory is filled with NaN
        result = arm(**inputs)
        torch.use_deterministic_algorithms(False)
        if case.is_index:
            found[name] = float(not torch.equal(result, exact))
        else:
            difference = (result.double() - exact).norm() / exact.norm()
            found[name] = float(difference.nan_to_num(nan=1e9))
    return found


def time_kernels(config, rows, kernels, read_rate, failed):
    """Return each kernel's errors and times at one batch."""
    found = {}
    for case in timed_cases(config, rows, kernels):
        errors = errors_of(case)
        wrong = {name: error for name, error in errors.items() if not error <= MAX_ERROR}
        timed = {"floor": 1e6 * case.num_bytes / read_rate, "errors": errors}
        failed += [f"{case.name} {name} at {rows}: {error:.3g}" for name, error in wrong.items()]
        sets = [case.inputs(seed) for seed in range(num_sets(case.num_bytes))]
        for name, arm in case.arms.items():
            if name not in wrong:
                timed[name] = 1e6 * seconds_per_call(
                    [lambda arm=arm, given=given: arm(**given) for given in sets]
                )
        del sets
        torch.cuda.empty_cache()
        found[case.name] = timed
        say(
            f"{rows:4} {case.name:20} " + "  ".join(f"{k} {v:.2f}" for k, v in timed.items() if k != "errors")
        )
    return found


def rounded(value):
    """Return numbers with four digits, whatever holds them."""
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def main():
    parser = argparse.ArgumentParser(description="Time the CUDA kernels.")
    parser.add_argument("--json", action="store_true", help="print the JSON line only, without the table")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--parts", default="kernels,steps")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--batches", default="1,8,64,256")
    arguments = parser.parse_args()
    parts, models = arguments.parts.split(","), arguments.models.split(",")
    batches = [int(batch) for batch in arguments.batches.split(",")]
    for chosen, known in ((parts, PARTS), (models, MODELS)):
        if not set(chosen) <= set(known):
            raise SystemExit(f"found {','.join(chosen)}; there are {', '.join(known)}")
    if not torch.cuda.is_available():
        raise SystemExit("needs a CUDA device")
    failed: list[str] = []
    read_rate = read_bytes_per_s()
    result = {
        "card": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "read_gb_s": read_rate / 1e9,
        "max_skinny_rows": MAX_FAST_ROWS,
        "failed": failed,
    }
    say(json.dumps(rounded(result)))

    def save():
        line = json.dumps(rounded(result))
        if arguments.out:
            arguments.out.write_text(line + "\n")
        return line

    with torch.inference_mode():
        for part in parts:
            of_models = result.setdefault(part, {})
            for model in models:
                say(f"{part} {model}")
                config = MODELS[model]
                if part == "kernels":
                    kernels = cuda_kernels(CUDA, DTYPE)
                    of_models[model] = {
                        str(rows): time_kernels(config, rows, kernels, read_rate, failed) for rows in batches
                    }
                elif part == "steps":
                    from tests.bench.kernel_steps import step_times

                    of_models[model] = step_times(config, batches)
                    say(json.dumps(rounded(of_models[model]), indent=1))
                else:
                    from tests.bench.kernel_tuning import tune

                    of_models[model] = tune(config, batches)
                save()
    if not arguments.json:
        print(json.dumps(rounded(result), indent=1))
    print(save())
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
