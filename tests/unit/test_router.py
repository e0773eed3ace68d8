"""The router: books, costs, filter and pick; what it answers when nobody takes work."""

import asyncio
import secrets

import pytest

from cluster.api.ports import NoReplicaError, OverloadedError
from cluster.router.books import LoadBook
from cluster.router.costs import PrefillRate, placement_cost
from cluster.router.router import Router
from cluster.router.ways import Way
from tests.unit.replica_threads import ThreadReplica
from workers.config import WorkerConfig
from workers.protocol import LoadReport, RequestId, SamplingParams, SubmitRequest

REPORT = LoadReport(
    num_running=2, num_waiting=1, num_prefill_tokens=100, num_pages=50, num_free_pages=5, num_cached_pages=10,
    step_s=0.01,
)  # fmt: skip


class Placements:
    def __init__(self):
        self.replicas = []
        self.num_pages = []

    def placed(self, replica_id, num_pages, num_held_pages):
        self.replicas.append(replica_id)
        self.num_pages.append((num_pages, num_held_pages))

    def hinted(self, kind):
        raise AssertionError("nobody told of a page elsewhere")


def request(name, token_ids=(1, 2, 3), max_tokens=4):
    sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    return SubmitRequest(RequestId(name), list(token_ids), sampling)


def test_what_was_sent_counts_until_the_worker_answers():
    book = LoadBook()
    book.report(REPORT, now_s=0.0)
    book.lease(RequestId("a"), 40, now_s=0.1)
    book.lease(RequestId("b"), 20, now_s=0.2)
    load = book.load(0.3)
    assert (load.num_prefill_tokens, load.num_running, load.num_waiting, load.num_sent) == (160, 2, 1, 2)
    book.report(REPORT, now_s=0.3, answered=[RequestId("a")])
    assert book.load(0.3).num_prefill_tokens == 120
    assert book.load(1.0).num_sent == 1
    assert book.load(1.25).num_sent == 0, "a lease ends by itself"


def test_reports_older_than_a_second_are_ignored():
    book = LoadBook()
    book.report(REPORT, now_s=0.0)
    assert book.load(1.0).num_running == 2
    late = book.load(1.01)
    assert (late.num_running, late.num_prefill_tokens, late.num_available_pages) == (0, 0, None)


def test_the_cost_of_a_placement_is_what_everyone_waits():
    book = LoadBook()
    book.report(REPORT, now_s=0.0)
    way = Way(num_computed_tokens=200, copy_s=0.05)
    cost = placement_cost(book.load(0.0), way, num_new_pages=20, page_size=16, token_s=0.001)
    assert cost.queue_s == pytest.approx(0.1)
    assert cost.copy_s == pytest.approx(0.05)
    assert cost.prefill_s == pytest.approx(0.2)
    assert cost.kv_wait_s == pytest.approx(5 * 16 * 0.001)
    assert cost.own_s == pytest.approx(0.43)
    assert cost.slowdown_s == pytest.approx(0.2 * 3), "copies slow nobody down"


def test_the_prefill_rate_is_a_running_mean_of_first_tokens():
    rate = PrefillRate()
    assert rate.token_s == 1e-3
    rate.observe(8, 5.0)  # too short to say anything
    assert rate.token_s == 1e-3
    rate.observe(100, 0.2)
    assert rate.token_s == pytest.approx(0.002)
    rate.observe(100, 0.3)
    assert rate.token_s == pytest.approx(0.0021)


@pytest.fixture
async def service():
    """A factory of routers over replicas in threads."""
    made, routers = [], []

    async def make(*configs, placements=None, **options):
        cluster_secret = secrets.token_bytes(32)
        replicas = [ThreadReplica(f"r{n}", cluster_secret, c, **options) for n, c in enumerate(configs)]
        made.extend(replicas)
        router = Router(
            {replica.replica_id: replica.endpoint for replica in replicas},
            cluster_secret,
            "api",
            card_digest="card",
            recorder=placements or Placements(),
        )
        routers.append(router)
        await router.start(5.0)
        return router, replicas

    yield make
    for router in routers:
        await router.close()
    for replica in made:
        replica.stop()


async def until(condition, timeout_s=5.0):
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def ends(stream):
    async with asyncio.timeout(10):
        return [output async for output in stream][-1]


async def test_nobody_ready_says_why(service):
    router, replicas = await service(None)
    assert router.ready() is None
    assert router.max_context_len == 8192
    replicas[0].stop()
    await until(lambda: router.ready() is not None)
    assert "r0" in router.ready()
    with pytest.raises(NoReplicaError, match="r0"):
        await router.submit(request("a"))


async def test_a_dead_replica_is_left_out(service):
    router, replicas = await service(None, None)
    replicas[0].stop()
    await until(lambda: router.num_ready == 1)
    assert router.ready() is None
    for n in range(3):
        stream = await router.submit(request(f"a{n}"))
        assert (await ends(stream)).finish_reason == "length"


async def test_the_pages_a_prompt_finds_are_counted_with_one_replica_too(service):
    placements = Placements()
    router, _ = await service(WorkerConfig(num_pages=64), placements=placements)
    for name in ("first", "second"):
        await ends(await router.submit(request(name, range(40))))
    assert placements.num_pages == [(2, 0), (2, 2)]


async def test_full_queues_everywhere_are_an_overload(service):
    tiny = WorkerConfig(num_pages=64, max_running_requests=1, max_waiting_requests=1)
    router, _ = await service(tiny, tiny, step_s=0.01)
    streams = []
    for n in range(4):
        streams.append(await router.submit(request(f"a{n}", [n + 1] * 40, max_tokens=500)))
        await anext(streams[-1])
        await asyncio.sleep(0.05)  # the load is reported
    with pytest.raises(OverloadedError) as raised:
        await router.submit(request("too many"))
    assert raised.value.retry_after_s > 0
    for stream in streams:
        await stream.aclose()


async def test_a_failing_step_ends_streams_with_a_documented_error(service):
    router, replicas = await service(None)
    stream = await router.submit(request("a", max_tokens=100_000))
    await anext(stream)
    replicas[0].engine.fail_next = True
    end = await ends(stream)
    assert (end.finish_reason, end.error_code) == ("error", "replica_failed")
    await until(lambda: router.ready() is not None)


async def test_a_cancelled_submit_of_a_long_prompt_leaves_nothing_behind(service):
    router, replicas = await service(None, None)
    task = asyncio.create_task(router.submit(request("long", [1] * 8000)))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.sleep(0.1)
    assert all(not replica.inbox.requests for replica in replicas)


async def test_a_queue_that_free_slots_await_is_not_full(service):
    """The worker allows so many running and waiting together; the router counts like it."""
    router, _ = await service(
        WorkerConfig(num_pages=64, max_running_requests=2, max_waiting_requests=2), step_s=0.3
    )
    first = await router.submit(request("a"))
    others = await asyncio.gather(router.submit(request("b")), router.submit(request("c")))
    streams = [first, *others, await router.submit(request("d"))]
    assert [(await ends(stream)).finish_reason for stream in streams] == ["length"] * 4


async def test_a_burst_that_overfills_one_replica_goes_on_to_the_next(service):
    """All eight are placed before any report comes back, by a prefix that only one replica holds."""
    tiny = WorkerConfig(num_pages=256, max_running_requests=2, max_waiting_requests=2)
    router, _ = await service(tiny, tiny, step_s=0.002)
    prefix = [5] * 512
    assert (await ends(await router.submit(request("warm", prefix)))).finish_reason == "length"
    streams = await asyncio.gather(*(router.submit(request(f"b{n}", [*prefix, n])) for n in range(8)))
    reasons = [(await ends(stream)).finish_reason for stream in streams]
    assert reasons == ["length"] * 8
