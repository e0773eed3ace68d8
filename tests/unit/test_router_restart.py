"""A replica that comes back under another endpoint: left out meanwhile, its former pages forgotten."""

import asyncio
import secrets

import pytest

from cluster.api.ports import NoReplicaError
from cluster.router.absences import FIRST_GUESS_S, LEAST_S, Absences
from cluster.router.router import Router
from tests.unit.replica_threads import ThreadReplica
from tests.unit.test_router import Placements, ends, request, until

PROMPT = range(1, 41)


@pytest.fixture
async def service():
    """A router over two replicas, and a factory of an incarnation in a former one's place."""
    secret = secrets.token_bytes(32)
    replicas = [ThreadReplica(f"r{n}", secret) for n in range(2)]
    placements = Placements()
    router = Router(
        {replica.replica_id: replica.endpoint for replica in replicas},
        secret,
        "api",
        card_digest="card",
        recorder=placements,
        overlay_s=0.0,
    )
    await router.start(5.0)

    def restart(number, name=None):
        replicas.append(ThreadReplica(name or f"r{number}", secret, incarnation=len(replicas)))
        return replicas[-1]

    yield router, replicas, restart, placements
    await router.close()
    for replica in replicas:
        replica.stop()


async def test_the_others_serve_until_it_is_back(service):
    router, replicas, restart, placements = service
    router.leave("r0", "it is being restarted (it died)")
    replicas[0].stop()
    for n in range(3):
        assert (await ends(await router.submit(request(f"a{n}")))).finish_reason == "length"
    assert set(placements.replicas) == {"r1"} and router.num_ready == 1 and router.ready() is None
    router.leave("r1", "it is being restarted (it died, too)")
    assert router.ready() == (
        "no replica is ready (r0: it is being restarted (it died); r1: it is being restarted (it died, too))"
    )
    with pytest.raises(NoReplicaError, match="being restarted") as raised:
        await router.submit(request("b"))
    assert FIRST_GUESS_S / 2 < raised.value.retry_after_s <= FIRST_GUESS_S
    router.move("r0", restart(0).endpoint)
    await until(lambda: router.ready() is None)
    assert (await ends(await router.submit(request("c")))).finish_reason == "length"
    assert placements.replicas[-1] == "r0"


async def test_a_new_incarnation_holds_none_of_the_former_ones_pages(service):
    router, replicas, restart, placements = service
    router.leave("r1", "only one is needed")
    for name in ("first", "second"):
        await ends(await router.submit(request(name, PROMPT)))
        await asyncio.sleep(0.1)  # the news of its pages has come
    assert placements.num_pages == [(2, 0), (2, 2)]
    router.leave("r0", "it died")
    replicas[0].stop()
    router.move("r0", restart(0).endpoint)
    await until(lambda: router.ready() is None)
    await ends(await router.submit(request("third", PROMPT)))
    assert placements.num_pages[-1] == (2, 0)


async def test_a_port_that_another_replica_has_now_is_not_taken_for_it(service):
    router, _, restart, _ = service
    router.leave("r0", "it died")
    router.leave("r1", "it died")
    router.move("r0", restart(0, name="r1").endpoint)
    await asyncio.sleep(0.5)
    assert "is of r1, not of r0" in router.ready()


def test_a_client_is_told_to_come_back_when_a_replica_is_likely_back():
    absences = Absences()
    assert absences.retry_after_s(100.0) == FIRST_GUESS_S, "of one that is lost and nobody has told so yet"
    absences.left("r0", 100.0)
    absences.left("r1", 104.0)
    assert absences.retry_after_s(106.0) == FIRST_GUESS_S - 6.0, "the first of them counts"
    assert absences.retry_after_s(300.0) == LEAST_S, "it is late: it may come at any time"
    absences.returned("r0", 140.0)
    absences.returned("r0", 150.0)  # told twice
    assert absences.retry_after_s(140.0) == 4.0, "the last one took 40 s"
    absences.left("r1", 150.0)  # its restart has failed
    assert absences.retry_after_s(151.0) == 39.0
