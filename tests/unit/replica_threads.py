"""Replicas without Ray or model: real scheduler, cache, step loop and inbox; tokens are made up."""

import threading
import time
from random import Random

from cache_service.keys import KVNamespace
from workers.completion_board import CompletionBoard
from workers.config import WorkerConfig
from workers.inbox import Inbox
from workers.kvcache.manager import KVCacheManager
from workers.plan import StepOutput
from workers.protocol import PROTOCOL_VERSION, ReplicaId, Welcome
from workers.scheduler.scheduler import Scheduler
from workers.step_loop import StepLoop

NAMESPACE = KVNamespace("weights", "", "float32", 16, "tp1").digest()


class FakeEngine:
    """Answers the position as the token; takes `step_s` and `token_s` for each input token."""

    def __init__(self, step_s, token_s):
        self.step_s = step_s
        self.token_s = token_s
        self.fail_next = False

    has_ended = True

    def launch(self, plan):
        if self.fail_next:
            raise RuntimeError("out of luck")
        if plan.slots:
            time.sleep(self.step_s + self.token_s * sum(plan.lens))
        tokens = [(plan.starts[row] + plan.lens[row]) % 1000 for row in plan.sampled]
        self.output = StepOutput(plan.step, plan.relocation_version, tokens, [None] * len(tokens))

    def collect(self):
        return self.output


class FakeGroup:
    size = 1

    def __init__(self):
        self.board = CompletionBoard.private()


class NoRecorder:
    def stepped(self, plan, duration_s):
        pass

    def loaded(self, load):
        pass


class RecordingInbox(Inbox):
    """Keeps what has come."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.received = []

    def drain(self, timeout_s):
        received = super().drain(timeout_s)
        self.received += received
        return received


class ThreadReplica:
    """One replica in a thread of this process."""

    def __init__(self, name, cluster_secret, config=None, *, step_s=0.001, token_s=0.0, incarnation=1):
        config = config or WorkerConfig(num_pages=4096, max_running_requests=64)
        self.replica_id = ReplicaId(name)
        self.cache = KVCacheManager(config.num_pages, config.page_size, NAMESPACE, incarnation)
        self.scheduler = Scheduler(
            config, self.cache, end_token_ids=[0], max_context_len=8192, vocab_size=1000, seeds=Random(0)
        )

        def welcome():
            version, snapshot = self.cache.snapshot()
            return Welcome(
                protocol_version=PROTOCOL_VERSION,
                replica_id=self.replica_id,
                incarnation=incarnation,
                card_digest="card",
                namespace=NAMESPACE,
                page_size=config.page_size,
                max_context_len=self.scheduler.max_context_len,
                max_requests=self.scheduler.max_requests,
                version=version,
                snapshot=snapshot,
            )

        self.engine = FakeEngine(step_s, token_s)
        self.inbox = RecordingInbox("127.0.0.1", cluster_secret, welcome)
        self.endpoint = self.inbox.endpoint
        self.loop = StepLoop(
            self.scheduler,
            self.engine,
            FakeGroup(),
            self.inbox,
            NoRecorder(),
            self.cache.take_events,
            incarnation=incarnation,
            clock=time.monotonic,
        )
        self.error = None
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self):
        try:
            self.loop.run()
        except RuntimeError as error:
            self.error = error
        finally:
            self.inbox.close(0.2)

    def stop(self):
        self.loop.stop()
        self.thread.join(5)
        assert not self.thread.is_alive()
