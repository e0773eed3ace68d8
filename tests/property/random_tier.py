"""A replica's life with a tier, drawn from a seed: quicker than a state machine, and deeper into loads."""

from dataclasses import replace
from random import Random
from typing import Any

from tests.property.fake_group import FakeGroup, least_pages, least_step_tokens, plain_rank
from tests.property.fake_mover import Faults
from tests.property.fake_sources import SourceOptions
from tests.property.fake_tier import TierOptions
from tests.property.sanitized_rank import SanitizedRank
from workers.kvcache.page_pool import Safety
from workers.move_board import MoveBoard
from workers.protocol import SamplingParams

MAX_CONTEXT_LEN = 24
# Prompts are cut from three texts, so that they share prefixes and come back.
TEXTS = ([1] * 64, [2, 1] * 32, [1] * 5 + [8] * 59)


def tier_options(random: Random, seed: int) -> TierOptions:
    """Half of the lives are spent in a large arena with little bad luck: there pages come back."""
    is_large = random.random() < 0.5
    pick = random.choice
    speeds = [0.1, 0.5, 1.0]
    return TierOptions(
        num_slots=random.randint(8, 24) if is_large else random.randint(1, 12),
        policy=pick(["write_through", "write_through_selective", "write_back"]),
        capacity=pick([8, 64] if is_large else [2, 8, 64]),
        speeds=(pick(speeds), pick(speeds)),
        news_ratio=pick([0.3, 1.0] if is_large else [0.1, 0.5, 1.0]),
        upset_ratio=pick([0.0, 0.0, 0.1, 0.3]),
        faults=Faults(
            io_ratio=pick([0.0, 0.0, 0.1] if is_large else [0.0, 0.0, 0.3, 1.0]),
            stale_ratio=pick([0.0, 0.0, 0.1]),
            torn_ratio=pick([0.0, 0.0, 0.1, 0.4]),
            late_ratio=Random(f"late/{seed}").choice([0.0, 0.0, 0.3, 1.0]),
        ),
        sources=SourceOptions(
            policy=pick(["best_effort", "wait_complete", "timeout"]),
            timeout_s=pick([1.0, 5.0]),
            page_s=pick([0.5, 0.5, 3.0]),
            speed=pick([0.2, 0.5, 1.0]),
            silent_ratio=pick([0.0, 0.0, 0.2]),
            failure_ratio=pick([0.0, 0.0, 0.1]),
            twice_ratio=pick([0.0, 0.3]),
            put_ratio=pick([0.0, 0.3]),
        ),
        seed=seed,
    )


def make_group(random: Random, seed: int, move_board: type[MoveBoard], **options: Any) -> FakeGroup:
    drawn: dict[str, Any] = {
        "page_size": random.choice([1, 2, 4]),
        "num_pages": random.randint(3, 16),
        "num_ranks": random.randint(1, 2),
        "max_running": random.randint(1, 5),
        "max_tokens_per_step": random.randint(1, 24),
        "depth": random.randint(0, 1),
        "make_rank": SanitizedRank if random.random() < 0.3 else plain_rank,
        "tier": replace(tier_options(random, seed), board=move_board),
    }
    if draft_tokens := options.get("draft_tokens"):
        least = least_pages(draft_tokens, drawn["page_size"])
        drawn["num_pages"] = max(drawn["num_pages"], least)
        drawn["max_tokens_per_step"] = max(drawn["max_tokens_per_step"], least_step_tokens(draft_tokens))
    return FakeGroup(**{**drawn, "max_context_len": MAX_CONTEXT_LEN, **options})


def submit(group: FakeGroup, random: Random) -> None:
    text = random.choice(TEXTS)[: min(random.randint(1, 23), group.scheduler.max_context_len - 1)]
    for _ in range(random.randint(1, 3)):
        options: dict[str, Any] = {
            "max_tokens": random.choice([None, 1, 4, 20]),
            "min_tokens": random.randint(0, 3),
            "ignore_eos": random.random() < 0.5,
            "seed": random.choice([None, 0, 1]),
        }
        salt = random.choice([b"", b"", b"", b"tenant"])
        hints = group.tier.sources.hints(len(text) // group.cache.page_size)
        group.submit(
            text,
            SamplingParams(**options),
            priority=random.randint(0, 2),
            tenant_salt=salt,
            hints=hints,
        )


def live(
    seed: int,
    *,
    safety: Safety | None = None,
    runs_checks: bool = True,
    move_board: type[MoveBoard] = MoveBoard,
    **options: Any,
) -> FakeGroup:
    """Live from `seed` to the last request's end; every check is made on the way.

    `options` of the FakeGroup take the place of those drawn.
    """
    random = Random(seed)
    group = make_group(random, seed, move_board, safety=safety, runs_checks=runs_checks, **options)
    for _ in range(random.randint(10, 80)):
        fate = random.random()
        if fate < 0.3 and len(group.unfinished) < 10:
            submit(group, random)
        elif fate < 0.35 and group.submits:
            group.abort(random.choice(sorted(group.submits)))
        elif fate < 0.4 and group.unfinished:
            group.step(abort_in_flight=random.choice(group.unfinished))
        else:
            group.step(lags=(random.randint(0, 3), random.randint(0, 3))[: len(group.ranks)])
    group.end()
    return group
