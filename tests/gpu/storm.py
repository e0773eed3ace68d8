"""A storm over the whole of one group: cache tier on, a device pool that evicts all the time, sanitizer on.

    python tests/gpu/storm.py [--tp-size 2] [--minutes 6] [--progress FILE] [--device cuda|cpu]
        [--shape smol135m] ...

128 mixed requests at a time (tests/gpu/storm_clients.py), in rounds. After each round its greedy answers are
compared with those of a rank by itself without the tier (storm_compare.py), all pages are proven to be there,
and the progress is written: called again with the same file it goes on with the next seed. A leg is a number
of rounds under one draw of page size, write policy and token budget.

A violation is: a sanitizer or ownership error, a torn or corrupt load, a leak, an output after the end, a
wrong token. It ends the storm with exit 1, its seed in the progress: `--first-round N --rounds 1` plays it
again.
One JSON line ends stdout. A round is made for a card: on a CPU rehearse with
`--shape tiny --concurrency 16 --requests 48 --max-prompt-len 60`.
"""

import argparse
import dataclasses
import json
import os
import sys
import time
import traceback
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from random import Random
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch  # noqa: E402

from cache_service.messages import Check, Done  # noqa: E402
from tests.bench.cache_node import CacheNode  # noqa: E402
from tests.bench.follower_ranks import FollowerRanks  # noqa: E402
from tests.bench.gpu_rank import BenchRank  # noqa: E402
from tests.bench.gpu_shapes import SHAPES, worker_options  # noqa: E402
from tests.bench.measuring import say  # noqa: E402
from tests.gpu.storm_clients import MAX_TOKENS, StormClients  # noqa: E402
from tests.gpu.storm_compare import Verdict, WrongToken, compare, max_margin_of  # noqa: E402
from tests.gpu.storm_progress import Round, read_progress, totals, write_progress  # noqa: E402
from tests.gpu.storm_trace import StormTrace, look_again  # noqa: E402
from workers.engine.mechanisms import ALL_ON, Mechanisms  # noqa: E402
from workers.kvcache.moves import MoveInjection  # noqa: E402

ROUNDS_PER_LEG = 8
PAGE_SIZES = (16, 4, 16, 32, 8)
POLICIES = ("write_through", "write_back", "write_through", "write_through_selective")
STEP_TOKENS = (768, 256, 2_048)
ITL_TARGETS = (None, None, 25.0)
OPTIONS = (
    "page_size",
    "write_policy",
    "max_tokens_per_step",
    "itl_target_ms",
    "overlap_depth",
    "graphs",
    "graph_batch_sizes",
    "graph_token_sizes",
    "attention_backend",
    "checked",
    "draft",
    "draft_tokens",
    "draft_topk",
    "draft_attention_backend",
)
"""Of WorkerConfig: given, they are not drawn."""
INJECTED_RATIO = 0.3
"""Of the legs: moves are late, out of order, fail, or leave flipped bits in the arena."""
MAX_DELAY_S = 0.0005
"""One thread waits for move after move: at 3 ms requests wait for it, few run at a time, and hardly any step
evicts."""
ARENA_POOLS = 6
"""Device pools that the arena holds: it evicts as well, more rarely."""


class Leg:
    """A group, a rank to compare it with and a node under one draw of options. Use as a context manager.

    `mechanisms` and `injection` are for tests that see what the storm then finds. `followers` are borrowed.
    """

    def __init__(
        self,
        number: int,
        arguments: argparse.Namespace,
        mechanisms: Mechanisms = ALL_ON,
        injection: MoveInjection | None = None,
        followers: FollowerRanks | None = None,
    ) -> None:
        random = Random(f"{arguments.seed}/leg/{number}")
        given = worker_options({name: getattr(arguments, name) for name in OPTIONS})
        self.options: dict[str, Any] = {
            "page_size": random.choice(PAGE_SIZES),
            "write_policy": random.choice(POLICIES),
            "max_tokens_per_step": random.choice(STEP_TOKENS),
            "itl_target_ms": random.choice(ITL_TARGETS),
            "overlap_depth": random.choice((1, 1, 0)),
            **given,
        }
        self.is_injected = (
            random.random() < INJECTED_RATIO if arguments.injection is None else arguments.injection == "on"
        )
        if self.is_injected:
            injection = MoveInjection(
                arguments.seed * 1_000 + number,
                max_delay_s=MAX_DELAY_S,
                failure_ratio=0.02,
                corruption_ratio=0.02,
                reorder_window=4,
            )
        page_size, concurrency = self.options["page_size"], arguments.concurrency
        request_len = arguments.max_prompt_len + MAX_TOKENS
        self.pool_tokens = max(
            int(concurrency * arguments.max_prompt_len * arguments.pool_ratio), request_len
        )
        common = {
            "device": arguments.device,
            "dtype": "bfloat16" if arguments.device == "cuda" else "float32",
            "max_running_requests": concurrency,
            "max_waiting_requests": 100_000,
            "num_threads": 1,
            **self.options,
        }
        with ExitStack() as stack:
            self.rank = stack.enter_context(
                BenchRank(
                    arguments.shape,
                    {
                        **common,
                        "num_pages": -(-self.pool_tokens // page_size) + 1,
                        "kv_sanitizer": True,
                        "tp_size": arguments.tp_size,
                    },
                    mechanisms,
                    followers=followers,
                )
            )
            self.reference = stack.enter_context(
                BenchRank(
                    arguments.shape,
                    {
                        **common,
                        "num_pages": concurrency * (-(-request_len // page_size) + 1),
                        "prefix_caching": False,
                        "draft": None,
                    },
                )
            )
            arena_bytes = ARENA_POOLS * self.pool_tokens * self.rank.token_bytes
            self.trace = StormTrace(self.rank, arguments.keep_logits)
            self.node = stack.enter_context(CacheNode(arena_bytes / (1 << 30) + 0.001))
            stack.callback(self.rank.attach(self.node, injection).close)
            self._resources = stack.pop_all()

    def __enter__(self) -> "Leg":
        return self

    def __exit__(self, *_: object) -> None:
        self._resources.close()

    def play(self, number: int, arguments: argparse.Namespace) -> Round:
        """Play a round and find out whether all of it was right."""
        found = Round(number, arguments.seed, self.options | {"injection": self.is_injected})
        began_s = time.perf_counter()
        try:
            self._play(found, arguments)
        except Exception as error:  # whatever a check raises is what the storm is for
            found.violations.append(f"{type(error).__name__}: {error}")
            say(traceback.format_exc())
        found.seconds = round(time.perf_counter() - began_s, 2)
        return found

    def _play(self, found: Round, arguments: argparse.Namespace) -> None:
        rank = self.rank
        before, failed_before = self._counts(), self._failed_moves()
        accepted_before = self._accept_lens()
        clients = StormClients(
            f"{arguments.seed}/{found.number}",
            arguments.requests,
            arguments.concurrency,
            rank.model.vocab_size,
            arguments.max_prompt_len,
        )
        self.trace.steps.clear()
        steps = rank.run(clients, timeout_s=arguments.round_timeout_s, launched=self.trace.launched)
        rank.settle()
        asked = list(clients.asked.values())
        found.num_requests = len(asked)
        for one in asked:
            reason = str(one.finish_reason)
            found.finished[reason] = found.finished.get(reason, 0) + 1
        found.num_tokens = sum(len(one.token_ids) for one in asked)
        for step in steps:
            name = f"{step.mode} {step.outcome}"
            found.outcomes[name] = found.outcomes.get(name, 0) + 1
        found.num_steps = len(steps)
        found.evicting_steps_ratio = round(sum(step.num_evictions > 0 for step in steps) / len(steps), 3)
        for name, count in self._counts().items():
            setattr(found, name, count - before[name])
        found.failed_moves = dict(self._failed_moves() - failed_before)
        found.accept_lens = dict(self._accept_lens() - accepted_before)
        found.violations += self._violations(found, clients)
        self._compare(found, [one for one in asked if one.is_greedy])

    def _counts(self) -> dict[str, int]:
        rank = self.rank
        assert rank.host_pages is not None and rank.host_pages.figures.tier is not None
        tier = rank.host_pages.figures.tier.stats
        return {
            "num_evictions": rank.cache.stats().num_evictions,
            "num_preemptions": rank.scheduler.stats.num_preemptions,
            "num_loaded_pages": tier.num_loaded_pages,
            "num_saved_pages": tier.num_saved_pages,
            "num_sanitized_steps": rank.engine.num_sanitized_steps,
        }

    def _failed_moves(self) -> Counter[str]:
        assert self.rank.host_pages is not None and self.rank.host_pages.figures.tier is not None
        stats = self.rank.host_pages.figures.tier.stats
        kinds = {"load": stats.failed_loads, "save": stats.failed_saves}
        return Counter({f"{kind} {why}": count for kind, of in kinds.items() for why, count in of.items()})

    def _accept_lens(self) -> Counter[str]:
        counts: Counter[str] = Counter()
        for (_, length), count in self.rank.scheduler.stats.accept_lengths.items():
            counts[str(length)] += count
        return counts

    def _violations(self, found: Round, clients: StormClients) -> list[str]:
        """Hold what is left against what must be."""
        told = []
        pages = self.rank.cache.stats()
        if pages.num_owned_pages != pages.num_cached_pages:
            told.append(f"pages leaked: {pages}")
        if clients.num_after_end:
            told.append(f"{clients.num_after_end} outputs came after their request's end")
        if strange := set(found.finished) - {"length", "stop", "abort"}:
            told.append(f"requests ended with {strange}")
        never = ("torn",) if self.is_injected else ("torn", "corrupt")
        bad = {name: count for name, count in found.failed_moves.items() if name.endswith(never)}
        if bad:
            told.append(f"moves failed: {bad}")
        if found.num_sanitized_steps < found.num_steps:
            told.append("steps went by without the sanitizer")
        checked = self.node.ask(Check())
        if not isinstance(checked, Done):
            told.append(f"the cache server's store: {checked}")
        return told

    def _compare(self, found: Round, answers: list) -> None:
        verdict: Verdict = compare(self.reference, answers, f"{found.seed}/{found.number}")
        self.reference.settle()
        found.num_compared, found.num_compared_tokens = len(answers), verdict.num_tokens
        found.num_ties, found.num_deep_ties = verdict.num_ties, verdict.num_deep_ties
        found.largest_tie = round(verdict.largest_tie, 4)
        found.violations += map(str, verdict.wrong)
        found.diagnoses += [
            self._diagnose(wrong, f"{found.seed}/{found.number}/again{number}")
            for number, wrong in enumerate(verdict.wrong)
        ]

    def _diagnose(self, wrong: WrongToken, name: str) -> dict[str, Any]:
        told = self.trace.about(wrong.asked, wrong.place)
        max_margin = max_margin_of(self.reference)
        asked = {"reference": self.reference, "reference_again": self.reference, "storm": self.rank}
        for which, rank in asked.items():
            told[which] = look_again(rank, wrong, f"{name}/{which}", max_margin)
            rank.settle()
        return told


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    made.add_argument("--minutes", type=float, default=6.0, help="no round begins after so many")
    made.add_argument("--rounds", type=int, help="no more rounds than these")
    made.add_argument("--first-round", type=int, help="begin here instead of after the progress")
    made.add_argument("--progress", type=Path, help="file of what was played, to go on from")
    made.add_argument("--seed", type=int, default=1)
    made.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    made.add_argument("--shape", choices=tuple(SHAPES), default="smol135m")
    made.add_argument("--tp-size", type=int, default=1, help="ranks of the group, on CUDA with a card each")
    made.add_argument("--concurrency", type=int, default=128)
    made.add_argument("--requests", type=int, default=512, help="of a round")
    made.add_argument("--max-prompt-len", type=int, default=400)
    made.add_argument("--pool-ratio", type=float, default=0.2, help="the pool over what all could need")
    made.add_argument("--round-timeout-s", type=float, default=240.0)
    made.add_argument("--injection", choices=("on", "off"), help="faults of moves; not given: drawn")
    made.add_argument("--keep-logits", action="store_true", help="tell the largest of a wrong token's step")
    for name in OPTIONS:
        made.add_argument(f"--{name.replace('_', '-')}", dest=name, help=f"as WorkerConfig.{name}")
    return made


def main() -> None:
    arguments = parser().parse_args()
    if arguments.device == "cpu":
        torch.set_num_threads(1)
    about = {"torch": torch.__version__, "card": "cpu", "shape": arguments.shape}
    if arguments.device == "cuda":
        about["card"] = torch.cuda.get_device_name()
    if arguments.tp_size == 1:
        play(arguments, about, None)
        return
    with FollowerRanks(arguments.tp_size - 1, arguments.device) as followers:
        play(arguments, about | {"tp_size": arguments.tp_size}, followers)


def play(arguments: argparse.Namespace, about: dict[str, Any], followers: FollowerRanks | None) -> None:
    """Play rounds and print what all of them came to; exit with 1 after a violation."""
    rounds = read_progress(arguments.progress)
    number = arguments.first_round if arguments.first_round is not None else len(rounds)
    end_s = time.perf_counter() + 60 * arguments.minutes
    new: list[Round] = []
    while time.perf_counter() < end_s and len(new) != arguments.rounds:
        with Leg(number // ROUNDS_PER_LEG, arguments, followers=followers) as leg:
            say(f"leg of round {number}: {leg.options}, {leg.pool_tokens} tokens, {leg.is_injected=}")
            while True:
                new.append(leg.play(number, arguments))
                write_progress(arguments.progress, rounds + new, about)
                say(f"round {number}: {dataclasses.asdict(new[-1])}")
                if new[-1].violations:
                    print(json.dumps(about | totals(rounds + new) | {"violations": new[-1].violations}))
                    raise SystemExit(1)
                number += 1
                if (
                    number % ROUNDS_PER_LEG == 0
                    or time.perf_counter() > end_s
                    or len(new) == arguments.rounds
                ):
                    break
    print(json.dumps(about | totals(rounds + new)))


if __name__ == "__main__":
    main()
