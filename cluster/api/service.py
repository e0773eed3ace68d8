"""Everything the routes need, made once by the API process (or a test) and passed to each of them."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from cluster.api.admin import CacheAdmin
from cluster.api.auth import Authenticator
from cluster.api.lifecycle import Lifecycle
from cluster.api.ports import RequestRecorder, RequestRouter, ScrapeTargets
from cluster.api.prompts import Limits, ServedModel
from cluster.api.request_ids import RequestIds
from cluster.api.text_threads import TextThreads


@dataclass(frozen=True)
class Service:
    """One API process's parts. Whoever builds it calls `threads.close()` at the end."""

    model: ServedModel
    router: RequestRouter
    recorder: RequestRecorder
    scrape_targets: ScrapeTargets
    authenticator: Authenticator
    cache_admin: CacheAdmin
    request_ids: RequestIds
    started_at_s: float
    """Unix time; what `/v1/models` calls `created`."""
    lifecycle: Lifecycle = field(default_factory=Lifecycle)
    threads: TextThreads = field(default_factory=TextThreads)
    clock: Callable[[], float] = time.monotonic
    """Seconds from some fixed point, for latencies."""
    wall_clock: Callable[[], float] = time.time
    """Unix time, for `created`."""

    def limits(self) -> Limits:
        """Return what calls are checked against: the model's context, or less where replicas hold less."""
        held = self.router.max_context_len
        context_len = self.model.context_len if held is None else min(held, self.model.context_len)
        return Limits(context_len, self.model.vocab_size)
