"""Decoding with a draft beside decoding without one, on chats; CPU or GPU, by the same script.

    python tests/bench/bench_speculation.py [--json] [--draft self] [--model smollm2-135m] [--device cpu|cuda]
        [--draft-tokens auto] [--accept-draft-tokens 3] [--batch-sizes 1,8,32] [--rounds 5] [--tokens 128]
        [--tp-size 2] [--prompts FILE] [--out FILE] [--quick] [--threads 2] [--graphs off] ...

The real Scheduler, Engine and step loop, without Ray and HTTP; greedy; held-out chats, or chosen turns of
chitchat-dataset where that file is not there. Every option of the workers is one here too. Progress goes to
stderr; one JSON line ends stdout:

speedup_b1, ...         tokens/s with the draft over those without, from when all answers of a batch have
                        begun until the first has ended: median over rounds, in which both arms take turns
accept_length           tokens a row and step that verified drafts brought, the token sampled behind right
                        drafts counted, with chains of `accept_draft_tokens`, over prompts that were computed
accept_length_by_origin the same chats, their prompts computed; found on the device; in the node's arena by a
                        rank started anew; fetched from there by a rank of another node. `found_ratio`: how
                        much of the prompts was found there, whole pages; the rest was computed
replay_ratio            by mode, of steps with the draft and of its own passes: replayed over all
off_ratio_b1, ...       with `--draft-tokens auto`: steps in which nothing was drafted

--quick     few and short answers: shows that it works, not how fast. --model tiny rehearses on a tiny model
            with random weights.
"""

import argparse
import json
import os
import statistics
import sys
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is loaded
os.environ.setdefault("GOMP_SPINCOUNT", "300")

import torch  # noqa: E402

from cache_service.client import CacheClient  # noqa: E402
from tests.bench.cache_node import CacheNode, eventually  # noqa: E402
from tests.bench.follower_ranks import START_TIMEOUT_S  # noqa: E402
from tests.bench.gpu_rank import BenchRank  # noqa: E402
from tests.bench.gpu_shapes import option_names, worker_options  # noqa: E402
from tests.bench.measuring import Medians, cpu_name, say  # noqa: E402
from tests.bench.speculation_chats import (  # noqa: E402
    HELD_OUT,
    MAX_PROMPT_LEN,
    Acceptance,
    Chats,
    chat_prompts,
)
from workers.kvcache.page_pool import Safety  # noqa: E402
from workers.protocol import FetchHint  # noqa: E402

ARMS = ("plain", "drafted")
NUM_ALONE = 3
"""Chats of a round in batches of one, one after another: one by itself says little of others."""
NUM_ORIGIN_CHATS = 32
NUM_TOGETHER = 4
"""Chats of which all prompts are fetched: of 32 at once most were computed instead."""
OTHER_NODE = "127.0.0.2"
ARENA_ROOM = 2.0


def measure_speed(arguments: argparse.Namespace, prompts: list[list[int]]) -> dict[str, Any]:
    """Return speedups and what they came of, by batch size, and how the drafted arm's steps ran."""
    batch_sizes = arguments.batch_sizes
    lens = {"num_pages": max(batch_sizes) * _pages_per_request(arguments), "prefix_caching": False}
    budget = {"max_running_requests": max(batch_sizes), "max_tokens_per_step": 8 * max(batch_sizes) + 512}
    options = lens | budget | arguments.options
    found: dict[str, Any] = {}
    replayed: Counter[tuple[str, bool]] = Counter()
    with ExitStack() as stack:
        ranks = {
            "plain": stack.enter_context(BenchRank(arguments.model, options)),
            "drafted": stack.enter_context(
                BenchRank(
                    arguments.model,
                    options | {"draft": arguments.draft, "draft_tokens": arguments.draft_tokens},
                )
            ),
        }
        say("; ".join(f"{arm}: started in {rank.start_s:.1f} s" for arm, rank in ranks.items()))
        for size in batch_sizes:
            medians, speedups = Medians(), []
            stats, acceptance = ranks["drafted"].scheduler.stats, Acceptance(ranks["drafted"])
            steps_before = Counter(stats.draft_steps)
            for round_ in range(-1, arguments.rounds):  # the first warms up
                num_batches = NUM_ALONE if size == 1 else 1
                first = (round_ + 1) * size * num_batches
                asked = [prompts[(first + number) % len(prompts)] for number in range(size * num_batches)]
                if round_ == 0:
                    acceptance, steps_before = Acceptance(ranks["drafted"]), Counter(stats.draft_steps)
                speeds = {}
                for arm in ARMS if round_ % 2 == 0 else ARMS[::-1]:
                    batches = [
                        Chats(f"{arm}/{size}/{round_}/{place}", asked[place : place + size], arguments.tokens)
                        for place in range(0, len(asked), size)
                    ]
                    for chats in batches:
                        ranks[arm].run(chats)
                    num_tokens = sum(chats.num_tokens for chats in batches)
                    speeds[arm] = num_tokens / sum(chats.seconds for chats in batches)
                if round_ >= 0:
                    for arm, speed in speeds.items():
                        medians.add(arm, speed)
                    speedups.append(speeds["drafted"] / speeds["plain"])
                    say(f"batch {size}, round {round_ + 1}: {speeds}")
            steps = Counter(stats.draft_steps) - steps_before
            replayed += acceptance.replayed()
            found[f"speedup_b{size}"] = round(statistics.median(speedups), 3)
            found[f"speedup_range_b{size}"] = [round(min(speedups), 3), round(max(speedups), 3)]
            found[f"tok_s_b{size}"] = {arm: round(medians[arm], 1) for arm in ARMS}
            found[f"draft_steps_b{size}"] = dict(sorted(steps.items()))
            found[f"off_ratio_b{size}"] = round(steps[0] / steps.total(), 3)
            found[f"accept_length_b{size}"] = _rounded(acceptance.length())
            say(f"batch {size}: speedup {found[f'speedup_b{size}']}, {found[f'draft_steps_b{size}']}")
        seconds = ranks["drafted"].engine.part_times.seconds
        found["part_seconds"] = {f"{mode}/{part}": round(each, 3) for (mode, part), each in seconds.items()}
    return found | {"replay_ratio": _ratios(replayed)}


def measure_origins(arguments: argparse.Namespace, prompts: list[list[int]]) -> dict[str, Any]:
    """Return accept lengths of the same chats by where their prompts were found, the tier attached."""
    prompts = prompts[: arguments.num_origin_chats]
    num_pages = len(prompts) * _pages_per_request(arguments)
    options = {
        "num_pages": num_pages,
        "max_running_requests": NUM_TOGETHER,
        "max_tokens_per_step": 1024,
        "draft": arguments.draft,
        "draft_tokens": arguments.accept_draft_tokens,
        "prefetch_policy": "timeout",
        "prefetch_timeout_s": 10.0,
    } | arguments.options
    lengths: dict[str, float | None] = {}
    found: dict[str, float] = {}
    replayed: Counter[tuple[str, bool]] = Counter()
    with ExitStack() as nodes:
        node: CacheNode | None = None
        other: CacheNode | None = None
        num_saved = 0
        for origins in (("computed", "device"), ("host",), ("peer",)):
            if origins == ("peer",) and not arguments.fetches:
                continue
            with ExitStack() as stack:
                # Prompts are fetched even where computing them is thought to be sooner.
                safety = Safety(weighs_fetches=False)
                rank = stack.enter_context(BenchRank(arguments.model, options, safety=safety))
                if node is None or other is None:
                    arena_gb = ARENA_ROOM * num_pages * rank.engine.layout.bundle_bytes / (1 << 30)
                    transfer = "tcp" if arguments.fetches else "off"
                    node = nodes.enter_context(CacheNode(arena_gb, transfer=transfer))
                    other = nodes.enter_context(CacheNode(arena_gb, OTHER_NODE, transfer=transfer))
                pages = rank.attach(other if origins == ("peer",) else node)
                stack.callback(pages.close)
                if origins == ("host",):
                    _await_pages(pages.client, num_saved)
                hints = None
                if origins == ("peer",):
                    size = rank.config.page_size
                    hints = [[FetchHint(node.endpoint, len(tokens) // size)] for tokens in prompts]
                for origin in origins:
                    acceptance = Acceptance(rank)
                    for first in range(0, len(prompts), NUM_TOGETHER):
                        group = slice(first, first + NUM_TOGETHER)
                        asked = Chats(
                            f"{origin}/{first}", prompts[group], arguments.tokens, hints and hints[group]
                        )
                        rank.run(asked)
                    rank.settle()
                    num_saved = max(num_saved, pages.client.num_known_pages)
                    lengths[origin] = _rounded(acceptance.length())
                    found[origin] = acceptance.found_ratio(origin)
                    replayed += acceptance.replayed()
                    say(f"{origin}: accept length {lengths[origin]}, found {found[origin]} of the prompts")
    return {
        "accept_length": lengths["computed"],
        "accept_draft_tokens": arguments.accept_draft_tokens,
        "accept_length_by_origin": lengths,
        "found_ratio": found,
        "replay_ratio_with_tier": _ratios(replayed),
    }


def _await_pages(client: CacheClient, num_pages: int) -> None:
    """Wait until a client has heard of the arena's pages."""
    eventually(lambda: client.num_known_pages >= num_pages, START_TIMEOUT_S)


def _pages_per_request(arguments: argparse.Namespace) -> int:
    """Return pages for a prompt, its answer and the places of drafts."""
    num_tokens = MAX_PROMPT_LEN + arguments.tokens + 48
    return int(-(-num_tokens // arguments.options.get("page_size", 16)))


def _ratios(counts: Counter[tuple[str, bool]]) -> dict[str, float]:
    modes = sorted({mode for mode, _ in counts})
    return {mode: round(counts[mode, True] / (counts[mode, True] + counts[mode, False]), 4) for mode in modes}


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def _read() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare decoding with and without a draft.")
    parser.add_argument("--json", action="store_true", help="print the JSON line only, without the table")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--draft", default="smollm2-135m-eagle3")
    parser.add_argument("--draft-tokens", default="auto")
    parser.add_argument("--accept-draft-tokens", type=int, default=3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tp-size", type=int, default=1, help="ranks, on cuda a GPU each")
    parser.add_argument("--batch-sizes", help="default: 1,8,32, on cuda also 64 and 256")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--parts", default="origins,speed")
    parser.add_argument("--no-fetches", dest="fetches", action="store_false", help="where Mooncake is not")
    parser.add_argument("--prompts", type=Path, default=HELD_OUT)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path)
    for name in set(option_names()) - {"draft", "draft_tokens"}:
        parser.add_argument(f"--{name.replace('_', '-')}", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    given = {**vars(arguments), "draft": None, "draft_tokens": None}
    try:
        options = worker_options(given)
        draft = worker_options({"draft_tokens": arguments.draft_tokens})
    except ValueError as error:
        parser.error(str(error))
    arguments.draft_tokens = draft["draft_tokens"]
    arguments.options = {
        "device": arguments.device,
        "dtype": arguments.dtype,
        "tp_size": arguments.tp_size,
        **options,
    }
    sizes = arguments.batch_sizes or ("1,8,32,64,256" if arguments.device == "cuda" else "1,8,32")
    arguments.batch_sizes = tuple(int(size) for size in sizes.split(","))
    arguments.num_origin_chats = NUM_ORIGIN_CHATS
    if arguments.quick:
        arguments.rounds, arguments.tokens, arguments.num_origin_chats = 1, 24, 4
    return arguments


def main() -> None:
    arguments = _read()
    if arguments.device == "cpu":
        torch.set_num_threads(arguments.threads)
    prompts = chat_prompts(arguments.model, arguments.prompts)
    result: dict[str, Any] = {
        "model": arguments.model,
        "draft": arguments.draft,
        "draft_tokens": arguments.draft_tokens,
        "prompts": arguments.prompts.name if arguments.prompts.exists() else "chitchat-dataset",
        "num_prompts": len(prompts),
        "tokens": arguments.tokens,
        "rounds": arguments.rounds,
        "device": torch.cuda.get_device_name() if arguments.device == "cuda" else cpu_name(),
        "dtype": arguments.dtype,
        "options": {name: str(value) for name, value in arguments.options.items()},
        "threads": arguments.threads,
        "load": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
    }
    for part in arguments.parts.split(","):
        result |= {"origins": measure_origins, "speed": measure_speed}[part](arguments, prompts)
        if arguments.out is not None:
            arguments.out.write_text(json.dumps(result) + "\n")
    if not arguments.json:
        for name, value in result.items():
            print(f"{name:24} {value}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
