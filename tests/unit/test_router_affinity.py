"""Requests go where their pages are cheapest to have: on the device, though its replica is the busier one; in
the node's arena; at a peer, told in a hint. Blind, they do not.
"""

import asyncio
import contextlib
from collections import Counter

import pytest

from cache_service.keys import page_keys
from cluster.router.costs import FIRST_PREFILL_TOKEN_S
from cluster.router.host_index import CacheAddress
from cluster.router.router import Router
from tests.unit.cache_nodes import SECRET, eventually, new_client, serving, store_keys
from tests.unit.replica_threads import NAMESPACE, ThreadReplica
from workers.protocol import RequestId, SamplingParams, SubmitRequest

NUM_CHATS = 20
FIRST_TURN_LEN = 256
ANSWER_LEN = 8
PAGE_SIZE = 16
PREFIX_LEN = 96
NUM_PROMPTS = 6
NUM_STORED = NUM_PROMPTS * PREFIX_LEN // PAGE_SIZE


class Placements:
    def __init__(self):
        self.replicas = []
        self.hints = []

    def placed(self, replica_id, num_pages, num_held_pages):
        self.replicas.append(replica_id)

    def hinted(self, kind):
        self.hints.append(kind)


@pytest.fixture
def replicas():
    made = [ThreadReplica(f"replica-{n}", SECRET, token_s=2e-5) for n in range(2)]
    yield made
    for replica in made:
        replica.stop()


async def make_router(replicas, recorder, **switches):
    router = Router(
        {replica.replica_id: replica.endpoint for replica in replicas},
        SECRET,
        "api",
        card_digest="card",
        recorder=recorder,
        **switches,
    )
    await router.start(5.0)
    return router


async def finish(stream):
    async with asyncio.timeout(20):
        outputs = [output async for output in stream]
    assert outputs[-1].finish_reason == "length"
    return [token for output in outputs for token in output.token_ids], outputs[-1].num_cached_tokens


def request(name, token_ids, max_tokens=ANSWER_LEN):
    sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    return SubmitRequest(RequestId(name), token_ids, sampling)


async def play_chats(router, recorder):
    """Two turns of interleaved chats; return where each turn went and the second turns' cached tokens."""
    prompts = {chat: [1 + (chat * 37 + i) % 997 for i in range(FIRST_TURN_LEN)] for chat in range(NUM_CHATS)}
    first, second, cached = {}, {}, {}
    for chat, prompt in prompts.items():
        tokens, _ = await finish(await router.submit(request(f"{chat}/1", prompt)))
        first[chat] = recorder.replicas[-1]
        prompts[chat] = prompt + tokens + [5] * 20
    for chat, prompt in prompts.items():
        # The holder is kept the busier one by requests of its own, sent there behind the router's back.
        holder = next(place.replica for place in router._places if place.replica_id == first[chat])
        busy = [holder.submit(request(f"{chat}/busy{n}", [7 + n], 10_000)) for n in range(3)]
        for stream in busy:
            await anext(stream)
        await asyncio.sleep(0.01)  # a step: the load has been reported
        stream = await router.submit(request(f"{chat}/2", prompt))
        second[chat] = recorder.replicas[-1]
        _, cached[chat] = await finish(stream)
        for stream in busy:
            await stream.aclose()
    return first, second, cached


async def test_second_turns_go_to_the_holder_though_it_is_busier(replicas):
    """By the replicas' events alone: the router's memory of its own decisions is off."""
    recorder = Placements()
    router = await make_router(replicas, recorder, overlay_s=0.0)
    try:
        first, second, cached = await play_chats(router, recorder)
    finally:
        await router.close()
    assert min(Counter(first.values()).values()) >= NUM_CHATS // 4, "both replicas hold chats"
    num_kept = sum(first[chat] == second[chat] for chat in first)
    assert num_kept >= 0.95 * NUM_CHATS
    num_found = sum(cached[chat] >= FIRST_TURN_LEN - 16 for chat in cached)
    assert num_found >= 0.95 * NUM_CHATS


async def test_without_events_second_turns_go_astray(replicas):
    """The ablation of the test above, equal to it but for the events: the router avoids the busy holder."""
    recorder = Placements()
    router = await make_router(replicas, recorder, takes_kv_events=False, overlay_s=0.0)
    try:
        first, second, cached = await play_chats(router, recorder)
    finally:
        await router.close()
    assert sum(first[chat] == second[chat] for chat in first) < 0.95 * NUM_CHATS
    assert sum(cached[chat] >= FIRST_TURN_LEN - 16 for chat in cached) < 0.95 * NUM_CHATS


async def test_a_burst_of_one_prefix_sticks_before_any_event_has_come(replicas):
    recorder = Placements()
    router = await make_router(replicas, recorder, takes_kv_events=False)
    prefix = [3] * 512
    try:
        burst = [request(f"burst{n}", [*prefix, n]) for n in range(6)]
        streams = await asyncio.gather(*map(router.submit, burst))
        await asyncio.gather(*map(finish, streams))
    finally:
        await router.close()
    assert len(set(recorder.replicas)) == 1


async def test_a_burst_without_a_common_prefix_is_spread(replicas):
    recorder = Placements()
    router = await make_router(replicas, recorder)
    try:
        streams = [await router.submit(request(f"spread{n}", [n + 1] * 300)) for n in range(10)]
        await asyncio.gather(*map(finish, streams))
    finally:
        await router.close()
    # Not always 5 and 5: a replica that has answered meanwhile is free again.
    counts = Counter(recorder.replicas)
    assert len(counts) == 2 and min(counts.values()) >= 3, counts


async def test_a_prefix_the_index_is_wrong_about_is_computed_by_the_worker(replicas):
    """The router may be stale, the worker is right: tokens as ever, `cached_tokens` what was there."""
    recorder = Placements()
    router = await make_router(replicas, recorder, takes_kv_events=False)
    prompt = [11 + i for i in range(FIRST_TURN_LEN)]
    try:
        tokens, _ = await finish(await router.submit(request("first", prompt)))
        liar = next(p for p in router._places if p.replica_id != recorder.replicas[-1])
        for place in router._places:  # a stale index: it names the one that holds nothing
            router._index.forget(place.replica_id)
            router._index._holdings[place.replica_id].expected.clear()
        keys = next(iter((await router._keys(request("keys", prompt))).values()))
        router._index.expect(liar.replica_id, keys, router._clock())
        again, cached = await finish(await router.submit(request("second", prompt)))
    finally:
        await router.close()
    assert recorder.replicas[-1] == liar.replica_id
    assert (again, cached) == (tokens, 0)


class Node:
    """A replica's node with a cache server, whose arena has what the test puts there."""

    def __init__(self, server, client):
        self.server = server
        self.client = client
        self.address = CacheAddress(server.core.endpoint, server.core.endpoint, server.core.broadcasts)

    def store(self, prompt):
        store_keys(self.client, page_keys(NAMESPACE, prompt, PAGE_SIZE))


@pytest.fixture
def nodes(tmp_path):
    with contextlib.ExitStack() as stack:
        made = []
        for name in ("node-0", "node-1"):
            (tmp_path / name).mkdir()
            server = stack.enter_context(serving(tmp_path / name))
            made.append(
                Node(server, stack.enter_context(contextlib.closing(new_client(server.core.endpoint))))
            )
        yield made


async def make_cached_router(replicas, nodes, recorder, **switches):
    """A router that has heard all that the nodes' arenas have."""
    caches = {replica.replica_id: node.address for replica, node in zip(replicas, nodes, strict=True)}
    router = await make_router(replicas, recorder, caches=caches, overlay_s=0.0, **switches)
    num_pages = [node.server.core.stats().num_ready for node in nodes]

    def has_heard():
        return [feed.num_host_pages for feed in router.cache_feeds()] == num_pages

    if switches.get("takes_relocations", True):
        await asyncio.to_thread(eventually, has_heard)
    return router


async def play_prompts_of_one_node(replicas, nodes, recorder, **switches):
    """Prompts whose pages are in node 1's arena, and on no device."""
    prompts = [[1 + (n * 41 + i) % 997 for i in range(PREFIX_LEN)] for n in range(NUM_PROMPTS)]
    for prompt in prompts:
        nodes[1].store(prompt)
    await asyncio.to_thread(eventually, lambda: nodes[1].server.core.stats().num_ready == NUM_STORED)
    router = await make_cached_router(replicas, nodes, recorder, **switches)
    try:
        for n, prompt in enumerate(prompts):
            await finish(await router.submit(request(f"hosted/{n}", [*prompt, 5, 6, 7])))
    finally:
        await router.close()
    return router._rate.token_s


async def test_prompts_go_to_the_node_whose_arena_has_them(replicas, nodes):
    recorder = Placements()
    token_s = await play_prompts_of_one_node(replicas, nodes, recorder)
    assert recorder.replicas == ["replica-1"] * NUM_PROMPTS
    assert recorder.hints == [], "the node has all there is"
    assert token_s == FIRST_PREFILL_TOKEN_S, "first tokens after copies say nothing of prefills"


async def test_without_relocations_prompts_go_past_the_arena(replicas, nodes):
    recorder = Placements()
    token_s = await play_prompts_of_one_node(replicas, nodes, recorder, takes_relocations=False)
    assert set(recorder.replicas) == {"replica-0", "replica-1"}
    assert token_s != FIRST_PREFILL_TOKEN_S


async def play_with_a_busy_holder(replicas, nodes, recorder, **switches):
    """A prompt in node 1's arena while its replica is busy; return the request as replica 0 got it."""
    prompt = [1 + i % 997 for i in range(PREFIX_LEN)]
    nodes[1].store(prompt)
    await asyncio.to_thread(eventually, lambda: nodes[1].server.core.stats().num_ready)
    router = await make_cached_router(replicas, nodes, recorder, **switches)
    try:
        holder = router._places[1].replica
        busy = [holder.submit(request(f"busy{n}", [7 + n], 10_000)) for n in range(3)]
        for stream in busy:
            await anext(stream)
        await asyncio.sleep(0.01)  # a step: the load has been reported
        await finish(await router.submit(request("hinted", [*prompt, *range(1, 21)])))
        for stream in busy:
            await stream.aclose()
    finally:
        await router.close()
    assert recorder.replicas == ["replica-0"]
    return next(got for got in replicas[0].inbox.received if got.request_id == "hinted")


async def test_a_busy_holders_prompt_goes_elsewhere_with_a_hint_that_names_its_cache_server(replicas, nodes):
    recorder = Placements()
    got = await play_with_a_busy_holder(replicas, nodes, recorder)
    assert [(hint.peer, hint.num_pages) for hint in got.hints] == [
        (nodes[1].server.core.endpoint, PREFIX_LEN // PAGE_SIZE)
    ]
    assert recorder.hints == ["peer"]


async def test_without_relocations_nobody_is_told_of_the_holder(replicas, nodes):
    recorder = Placements()
    got = await play_with_a_busy_holder(replicas, nodes, recorder, takes_relocations=False)
    assert got.hints == [] and recorder.hints == []
