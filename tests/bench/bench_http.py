"""What HTTP, processes and Ray cost on top of the engine: `python tests/bench/bench_http.py --json`.

http_ms_*      StepOutput in the worker to the client's read, p50, through inbox, replica, API and uvicorn.
               The worker writes its clock into each token's logprob (all processes share that clock).
uvicorn_ms_*   the same read for a bare uvicorn application that streams events with its clock at that pace.
actor_ratio    inter-token latency at one stream through `eyrie serve` over that of Scheduler and Engine
               driven in a plain process, rounds interleaved, medians.
idle_pss_gb    sum of proportional set sizes of all processes of the idle service, default pool.
start_s        `eyrie serve` to its ready line.
Progress goes to stderr; stdout ends in one JSON line.
"""

import argparse
import asyncio
import itertools
import json
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

MODEL = "smollm2-135m"
PROMPT_LEN = 128
NUM_TOKENS = 48
NUM_ROUNDS = 3
THREAD_ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "300"}


def tell(text):
    print(text, file=sys.stderr, flush=True)


# Roles: each runs in a process of its own and says `ready ...` on stdout.


def make_rank(cluster_secret):
    from workers.config import WorkerConfig
    from workers.protocol import ReplicaId
    from workers.rank import Rank, RankSpec

    config = WorkerConfig(model=MODEL, kv_gb=0.25)
    spec = RankSpec(config, ReplicaId("bench"), 0, 1, "127.0.0.1", "127.0.0.1", 0, os.cpu_count() or 1)
    return Rank(spec, cluster_secret)


def run_worker(cluster_secret):
    """A rank whose engine stamps each token."""
    from workers.plan import StepOutput
    from workers.protocol import TokenLogprobs

    rank = make_rank(cluster_secret)
    engine = rank._loop._engine

    class StampingEngine:
        def run(self, plan):
            output = engine.run(plan)
            stamp = TokenLogprobs(-time.monotonic(), [], [])
            return StepOutput(
                output.step, output.relocation_version, output.token_ids, [stamp] * len(output.token_ids)
            )

    rank._loop._engine = StampingEngine()
    print(f"ready {rank.inbox.endpoint}", flush=True)
    rank.run()


def run_api(cluster_secret, endpoint):
    """The API process as the actor runs it, without Ray."""
    from cache_service.curve import write_cluster_secret
    from cluster.api.server import ApiServer
    from cluster.config import ClusterConfig
    from workers.config import WorkerConfig
    from workers.protocol import ReplicaId

    folder = Path(tempfile.mkdtemp())
    write_cluster_secret(folder / "secret", cluster_secret)
    (folder / "keys").touch(mode=0o600)
    config = ClusterConfig(worker=WorkerConfig(model=MODEL), port=0, log_level="error")

    async def serve():
        server = ApiServer(config, folder / "secret", folder / "keys")
        started = await server.start({ReplicaId("bench"): endpoint}, [])
        print(f"ready {started.url}", flush=True)
        await asyncio.Event().wait()

    asyncio.run(serve())


def run_plain(pace_s):
    """uvicorn and nothing else: NUM_TOKENS events at the engine's pace, all streams in step."""
    import socket

    import uvicorn

    async def app(scope, receive, send):
        await send(
            {
                "type": "http.response.start",
                "status": 200,
                "headers": [(b"content-type", b"text/event-stream")],
            }
        )
        for _ in range(NUM_TOKENS):
            await asyncio.sleep(pace_s - time.monotonic() % pace_s)
            choice = {"logprobs": {"token_logprobs": [-time.monotonic()]}, "text": " word"}
            event = b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n"
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    listener = socket.create_server(("127.0.0.1", 0))
    print(f"ready http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    config = uvicorn.Config(app, http="httptools", lifespan="off", log_config=None, access_log=False)
    uvicorn.Server(config).run(sockets=[listener])


def run_bare():
    """Scheduler and Engine in a loop: on each line of stdin, one round; answer its inter-token p50 in ms."""
    from workers.protocol import RequestId, SamplingParams, SubmitRequest

    rank = make_rank(secrets.token_bytes(32))
    scheduler, engine = rank._loop._scheduler, rank._loop._engine
    print("ready -", flush=True)
    for number, _ in enumerate(sys.stdin):
        sampling = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
        scheduler.add(SubmitRequest(RequestId(f"b{number}"), prompt(number, 900), sampling), time.monotonic())
        stamps = []
        while scheduler.has_requests:
            output = engine.run(scheduler.plan(time.monotonic()))
            scheduler.completed(output.step)
            stamps += [time.monotonic()] if output.token_ids else []
            scheduler.commit(output)
        print(1000 * statistics.median(gaps(stamps)), flush=True)


# The client.


def prompt(number, seed):
    """Token ids no two streams share, so that none finds its prompt cached."""
    return [100 + (seed * 7919 + number * 104_729 + place * 31) % 20_000 for place in range(PROMPT_LEN)]


def gaps(stamps):
    return [later - earlier for earlier, later in itertools.pairwise(stamps)]


async def read_stream(url, number, seed):
    """Stream one completion; return (read, stamp) of each event."""
    host, _, port = url.removeprefix("http://").rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port), limit=1 << 20)
    body = json.dumps(
        {
            "model": MODEL,
            "prompt": prompt(number, seed),
            "max_tokens": NUM_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "logprobs": 0,
            "stream": True,
        }
    ).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
    writer.write(f"{head}connection: close\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)
    events = []
    while line := await reader.readline():
        if not line.startswith(b"data: {"):
            continue
        read = time.monotonic()
        logprobs = json.loads(line[6:])["choices"][0]["logprobs"]
        if logprobs and logprobs["token_logprobs"]:
            events.append((read, -logprobs["token_logprobs"][-1]))
    writer.close()
    assert len(events) > NUM_TOKENS / 2, f"{len(events)} events"
    return events


async def measure(url, num_streams, seed):
    """Return (p50 of read - stamp, p50 of gaps between reads), in ms, steady decode only."""
    streams = await asyncio.gather(*(read_stream(url, number, seed) for number in range(num_streams)))
    began = max(events[0][0] for events in streams)
    delays = [read - stamp for events in streams for read, stamp in events if read > began]
    between = [gap for events in streams for gap in gaps([read for read, _ in events if read > began])]
    return 1000 * statistics.median(delays), 1000 * statistics.median(between)


class Role:
    """A child process of this file, or the service itself."""

    def __init__(self, *command, **environment):
        self.process = subprocess.Popen(
            [sys.executable, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, **environment},
        )
        self._log = []
        threading.Thread(target=self._read_log, daemon=True).start()
        self.answer = self._ready()

    def _read_log(self):
        for line in self.process.stderr:
            self._log.append(line)

    def _ready(self):
        for line in self.process.stdout:
            if line.startswith("ready "):
                return line.split()[1]
        raise RuntimeError("".join(self._log[-30:]))

    def ask(self):
        """One round of the bare loop."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())

    def family(self):
        root = psutil.Process(self.process.pid)
        return [root, *root.children(recursive=True)]

    def stop(self):
        self.process.terminate()
        self.process.wait(60)


def role(name, *arguments, **environment):
    return Role(__file__, "--role", name, *map(str, arguments), **environment)


def median_rounds(url, num_streams):
    rounds = [asyncio.run(measure(url, num_streams, seed)) for seed in range(NUM_ROUNDS)]
    return tuple(statistics.median(column) for column in zip(*rounds, strict=True))


def bench_http(results):
    """The path from StepOutput to the client's read, and plain uvicorn's beside it."""
    cluster_secret = secrets.token_hex(32)
    tell("starting worker and API process")
    worker = role("worker", cluster_secret, **THREAD_ENVIRONMENT)
    api = role("api", cluster_secret, worker.answer)
    asyncio.run(measure(api.answer, 1, 77))  # warm
    for num_streams in (1, 16):
        delay_ms, pace_ms = median_rounds(api.answer, num_streams)
        plain = role("plain", pace_ms / 1000)
        plain_ms, _ = median_rounds(plain.answer, num_streams)
        plain.stop()
        tell(
            f"{num_streams} streams: {delay_ms:.2f} ms, uvicorn alone {plain_ms:.2f}, every {pace_ms:.1f} ms"
        )
        results[f"http_ms_{num_streams}"] = round(delay_ms, 2)
        results[f"uvicorn_ms_{num_streams}"] = round(plain_ms, 2)
    api.stop()
    worker.stop()


def bench_service(results):
    """Start, memory and inter-token latency of `eyrie serve`."""
    tell("starting the service")
    begin = time.monotonic()
    service = Role("-m", "cluster", "serve", MODEL, "--port", "0", "--log-level", "error")
    results["start_s"] = round(time.monotonic() - begin, 1)
    time.sleep(3)
    pss = sum(process.memory_full_info().pss for process in service.family())
    results["idle_pss_gb"] = round(pss / 2**30, 2)
    tell(f"ready in {results['start_s']} s, {results['idle_pss_gb']} GiB")
    bare = role("bare", **THREAD_ENVIRONMENT)
    actor_ms, bare_ms = [], []
    for seed in range(2 + NUM_ROUNDS):
        bare_ms.append(bare.ask())
        actor_ms.append(asyncio.run(measure(service.answer, 1, 1000 + seed))[1])
        tell(f"inter-token: bare {bare_ms[-1]:.2f} ms, service {actor_ms[-1]:.2f} ms")
    results["bare_inter_token_ms"] = round(statistics.median(bare_ms[1:]), 2)
    results["actor_inter_token_ms"] = round(statistics.median(actor_ms[1:]), 2)
    results["actor_ratio"] = round(results["actor_inter_token_ms"] / results["bare_inter_token_ms"], 3)
    bare.process.stdin.close()
    bare.process.wait(30)
    service.stop()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", action="store_true", help="end stdout in one JSON line (always so)")
    parser.add_argument("--role", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    match arguments.role:
        case None:
            results = {"cores": len(os.sched_getaffinity(0)), "load": round(os.getloadavg()[0], 2)}
            bench_service(results)
            bench_http(results)
            print(json.dumps(results))
        case ["worker", cluster_secret]:
            run_worker(bytes.fromhex(cluster_secret))
        case ["api", cluster_secret, endpoint]:
            run_api(bytes.fromhex(cluster_secret), endpoint)
        case ["plain", pace_s]:
            run_plain(float(pace_s))
        case ["bare"]:
            run_bare()


if __name__ == "__main__":
    main()
