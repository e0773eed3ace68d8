"""Drive a Scheduler and an Engine without Ray, step by step and under every check, at any TP size.

    with Harness(config) as harness:
        harness.submit("a", [1, 2, 3], max_tokens=8)
        harness.run()
        harness.answers["a"].token_ids

Ranks beyond the first are processes that follow over a real TPGroup (followers.py).
"""

import json
import time
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Self

import msgspec
import torch
from tokenizers import Tokenizer, models

from cache_service.client import CacheClient
from tests.arena_host import ArenaHost
from tests.followers import TIMEOUT_S, Followers
from tests.node_host import NodeHost
from workers.card import ModelCard, load_card, page_layout
from workers.config import WorkerConfig
from workers.draft_card import read_draft_card
from workers.engine.engine import Engine
from workers.engine.mechanisms import ALL_ON, Mechanisms
from workers.kvcache.fetch_costs import FetchCosts
from workers.kvcache.host_tier import WritePolicy
from workers.kvcache.manager import KVCacheManager
from workers.kvcache.page_pool import Safety
from workers.kvcache.prefetcher import PrefetchOptions
from workers.parallel import TPGroup
from workers.plan import BatchPlan
from workers.protocol import (
    FetchHint,
    FinishReason,
    KVEvent,
    RequestId,
    RequestOutput,
    SamplingParams,
    SubmitRequest,
    TokenLogprobs,
)
from workers.scheduler.scheduler import Scheduler
from workers.step_loop import STALL_S

TINY_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def write_tiny_model(folder: Path, **changes: object) -> Path:
    """Write config and tokenizer of a two-layer model whose heads do not divide by two: for dummy weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(TINY_CONFIG | changes))
    words = {f"<{index}>": index for index in range(256)}
    Tokenizer(models.WordLevel(words, unk_token="<0>")).save(str(folder / "tokenizer.json"))
    return folder


def tiny_config(model: Path, **changes: object) -> WorkerConfig:
    """Return options fit for a tiny model: float32, eager reference speed, sanitizer on."""
    options: dict[str, object] = {
        "model": str(model),
        "load_format": "dummy",
        "dtype": "float32",
        "num_pages": 256,
        "page_size": 4,
        "max_running_requests": 8,
        "max_tokens_per_step": 32,
        "kv_sanitizer": True,
        "attention_backend": "reference",
        "num_threads": 1,
        "draft_tokens": 3,
    }
    return WorkerConfig(**(options | changes))  # type: ignore[arg-type]


@dataclass
class Answer:
    """What has reached the client of one request."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    num_cached_tokens: int = 0
    num_accepted_drafts: int = 0
    num_rejected_drafts: int = 0


class Harness:
    """Rank 0 in this process. Each step proves what scheduler, cache and sanitizer claim."""

    def __init__(
        self,
        config: WorkerConfig,
        *,
        seed: int = 0,
        incarnation: int = 1,
        mechanisms: Mechanisms = ALL_ON,
        safety: Safety | None = None,
        followers: Followers | None = None,
        host: ArenaHost | NodeHost | None = None,
        write_policy: WritePolicy = "write_through",
    ) -> None:
        """`followers` and `host` are borrowed; without the former a group of several ranks starts its own."""
        self.config = config
        self.host = host
        self.answers: dict[str, Answer] = {}
        self.plans: list[BatchPlan] = []
        self.events: list[KVEvent] = []
        self._num_launched = 0
        with ExitStack() as stack:
            torch.set_num_threads(max(config.num_threads, 1))
            card = load_card(config.model)
            place = host.place(bundle_bytes(config, card), config.tp_size) if host is not None else None
            if config.tp_size == 1:
                self._group = TPGroup.single()
            else:
                followers = followers or stack.enter_context(Followers(config.tp_size - 1))
                self._group = stack.enter_context(followers.group(config, place))
            self.engine = Engine(config, card, self._group, mechanisms)
            stack.callback(self.engine.close)
            self.cache = KVCacheManager(
                self.engine.num_pages,
                config.page_size,
                self.engine.namespace.digest(),
                incarnation,
                prefix_caching=config.prefix_caching,
                safety=safety,
            )
            if place is not None:
                attached, self.mover = place.attach(self.engine, self._group)
                stack.callback(attached.close)
                stack.callback(self.mover.close)
                self.attach(host.cache_of(attached), write_policy)
            self.scheduler = Scheduler(
                config,
                self.cache,
                end_token_ids=list(card.end_token_ids),
                max_context_len=self.engine.max_context_len,
                vocab_size=card.vocab_size,
                seeds=Random(seed),
                step_sizes=self.engine.step_sizes,
                safety=safety,
            )
            self._resources = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the log; the other ranks' processes end with it."""
        self._resources.close()

    def attach(self, cache: ArenaHost | CacheClient, policy: WritePolicy) -> None:
        """Have pages saved and loaded, and fetched where there is a server that can."""
        self.tier = self.cache.attach_tier(cache, self._group.moves, policy)
        if isinstance(cache, CacheClient):
            self.client = cache
            config, page_bytes = self.config, self.engine.layout.bundle_bytes * self._group.size
            self.prefetcher = self.cache.attach_prefetcher(
                cache,
                FetchCosts(page_bytes, config.page_size),
                PrefetchOptions(config.prefetch_policy, config.prefetch_timeout_s),
            )

    def submit(
        self,
        request_id: str,
        token_ids: list[int],
        *,
        priority: int = 0,
        tenant_salt: bytes = b"",
        hints: Iterable[FetchHint] = (),
        **sampling: object,
    ) -> None:
        """Queue a request, greedy unless `sampling` says otherwise."""
        params = SamplingParams(**({"temperature": 0.0} | sampling))  # type: ignore[arg-type]
        self.answers[request_id] = Answer()
        submit = SubmitRequest(
            RequestId(request_id), list(token_ids), params, priority, tenant_salt, list(hints)
        )
        self.scheduler.add(submit, time.monotonic())

    def abort(self, request_id: str, reason: FinishReason = "abort") -> None:
        """End a request if it has not ended."""
        output = self.scheduler.abort(RequestId(request_id), reason)
        self._take([] if output is None else [output])

    def step(self, lost: type | None = None) -> list[RequestOutput]:
        """Plan and launch a step, and commit the oldest that is under way, as the step loop does.

        Returns what was committed. Ops of type `lost`, of which there must be some, do not reach the ranks.
        """
        self.scheduler.completed(self._group.board.minimum())
        plan = self.scheduler.plan(time.monotonic())
        if plan is not None:
            self.plans.append(plan)
            self._launch(plan if lost is None else without(plan, lost))
        outputs: list[RequestOutput] = []
        if self._num_launched and (plan is None or self._num_launched > self.config.depth):
            outputs = self._commit()
        elif plan is None:
            time.sleep(STALL_S)  # for moves under way, if anything
        batch = self.cache.take_events()
        self.events += batch.events if batch is not None else []
        self.scheduler.check()
        self._take(outputs)
        return outputs

    def _launch(self, plan: BatchPlan) -> None:
        """Launch a plan on all ranks."""
        if self._group.size > 1:
            self._group.broadcast_plan(msgspec.msgpack.encode(plan))
        self.engine.launch(plan)
        self._num_launched += 1

    def _commit(self) -> list[RequestOutput]:
        output = self.engine.collect()
        self._num_launched -= 1
        self._group.board.publish(output.step)
        return self.scheduler.commit(output)

    def run(self, max_steps: int = 10_000) -> None:
        """Step until every request has ended."""
        for _ in range(max_steps):
            if not self.scheduler.has_requests:
                return
            self.step()
        raise AssertionError(f"after {max_steps} steps unfinished: {self.unfinished()}")

    def unfinished(self) -> list[str]:
        return [request_id for request_id, answer in self.answers.items() if answer.finish_reason is None]

    def idle_pages(self) -> dict[str, int]:
        """Step until nothing quiesces and return pages by state."""
        assert not self.scheduler.has_requests
        deadline_s = time.monotonic() + TIMEOUT_S
        while self._is_settling() and time.monotonic() < deadline_s:
            self.scheduler.completed(self._group.board.minimum())
            self.step()
        stats = self.cache.stats()
        return {
            "free": stats.num_free_pages,
            "owned": stats.num_owned_pages,
            "quiescing": stats.num_quiescing_pages,
            "cached": stats.num_cached_pages,
        }

    def _is_settling(self) -> bool:
        is_under_way = self._num_launched > 0 or self.scheduler.has_moves
        return is_under_way or self.cache.stats().num_quiescing_pages > 0

    def _take(self, outputs: Iterable[RequestOutput]) -> None:
        for output in outputs:
            answer = self.answers[output.request_id]
            assert answer.finish_reason is None, f"{output.request_id}: output after its end"
            answer.token_ids += output.token_ids
            answer.logprobs += output.logprobs
            answer.finish_reason = output.finish_reason
            answer.num_cached_tokens = output.num_cached_tokens
            answer.num_accepted_drafts += output.num_accepted_drafts
            answer.num_rejected_drafts += output.num_rejected_drafts


def bundle_bytes(config: WorkerConfig, card: ModelCard) -> int:
    """Count the bytes of a page on one rank, as the engine will lay it out."""
    shape = None if config.draft is None else read_draft_card(config.draft, card).page_shape(config.tp_size)
    return page_layout(card, config, shape).bundle_bytes


def without(plan: BatchPlan, lost: type) -> BatchPlan:
    """Return the plan less its ops of one type."""
    kept = [op for op in plan.ops if not isinstance(op, lost)]
    assert len(kept) < len(plan.ops), f"the plan has no {lost.__name__}"
    return msgspec.structs.replace(plan, ops=kept)
