"""What HTTP, processes and Ray cost on top of the engine: `python tests/bench/bench_http.py --json`.

http_ms_*      StepOutput in the worker to the client's read, p50, through inbox, replica, API and uvicorn.
               The worker writes its clock into each token's logprob (all processes share that clock).
uvicorn_ms_*   the same read for a bare uvicorn application that streams events with its clock at that pace.
actor_ratio    inter-token latency at one stream through a Worker actor, read at its inbox, over that of
               Scheduler and Engine driven in a plain process, rounds interleaved, medians.
service_ratio  the same through `eyrie serve`, read by an HTTP client: API process and client take their share
               of the cores that the engine's threads run on.
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

import msgspec
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
    from workers.protocol import TokenLogprobs

    rank = make_rank(cluster_secret)
    engine = rank._loop._engine

    class StampingEngine:
        launch = engine.launch

        def collect(self):
            output = engine.collect()
            stamp = TokenLogprobs(-time.monotonic(), [], [])
            return msgspec.structs.replace(output, logprobs=[stamp] * len(output.token_ids))

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
        print(f"ready {(await server.start({ReplicaId('bench'): endpoint}, [], {})).url}", flush=True)
        await asyncio.Event().wait()

    asyncio.run(serve())


def run_actor(cluster_secret):
    """A Worker actor on a Ray of its own; ends with stdin."""
    from cache_service.curve import write_cluster_secret
    from cluster.local_ray import start_local_ray
    from cluster.run_folder import RunFolder

    folder = RunFolder()
    try:
        start_local_ray(folder, num_cpus=4, num_gpus=0)
        import ray

        from workers.config import WorkerConfig
        from workers.protocol import ReplicaId
        from workers.worker import Worker

        secret_file = folder.path / "cluster.secret"
        write_cluster_secret(secret_file, cluster_secret)
        options = {"num_cpus": 0, "max_concurrency": 4, "runtime_env": {"env_vars": THREAD_ENVIRONMENT}}
        config, num_threads = WorkerConfig(model=MODEL, kv_gb=0.25), os.cpu_count() or 1
        worker = (
            ray.remote(Worker)
            .options(**options)
            .remote(config, ReplicaId("bench"), 0, 1, num_threads, "127.0.0.1", secret_file, "error")
        )
        host, port = ray.get(worker.rendezvous.remote())
        print(f"ready {ray.get(worker.start.remote(host, port, 120.0)).endpoint}", flush=True)
        sys.stdin.read()
        ray.get(worker.stop.remote(10.0))
        ray.shutdown()
    finally:
        folder.remove()


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


class InboxReader:
    """Reads a worker's inbox without an API process. Itself its Connection's listener."""

    def __init__(self, endpoint, cluster_secret):
        from cluster.connection import Connection

        self._generation, self._stamps, self._ended = 0, [], threading.Event()
        self._opened = threading.Event()
        self._connection = Connection(endpoint, cluster_secret, "bench", self, lease_s=20.0)
        self._connection.start()
        assert self._opened.wait(20), "the worker does not answer"

    def ask(self, number):
        """One stream; return its inter-token p50 in ms."""
        from workers.protocol import RequestId, SamplingParams, SubmitRequest

        self._stamps.clear()
        self._ended.clear()
        sampling = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
        request = SubmitRequest(RequestId(f"a{number}"), prompt(number, 901), sampling)
        self._connection.send(self._generation, request)
        assert self._ended.wait(120) and len(self._stamps) == NUM_TOKENS
        return 1000 * statistics.median(gaps(self._stamps))

    def close(self):
        self._connection.close()

    def opened(self, generation, welcome):
        self._generation = generation
        self._opened.set()

    def stepped(self, outputs, load, kv_events):
        for output in outputs:
            self._stamps += [time.monotonic()] * len(output.token_ids)
            if output.finish_reason is not None:
                self._ended.set()
        return True

    def closed(self, why):
        self._ended.set()


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
    cluster_secret = secrets.token_bytes(32)
    actor = role("actor", cluster_secret.hex())
    reader = InboxReader(actor.answer, cluster_secret)
    rounds = []
    for seed in range(2 + NUM_ROUNDS):
        service_ms = asyncio.run(measure(service.answer, 1, 1000 + seed))[1]
        rounds.append((bare.ask(), reader.ask(seed), service_ms))
        tell("inter-token: bare {:.2f} ms, actor {:.2f} ms, service {:.2f} ms".format(*rounds[-1]))
    bare_ms, *others_ms = (statistics.median(column) for column in zip(*rounds[1:], strict=True))
    results["bare_inter_token_ms"] = round(bare_ms, 2)
    for name, value_ms in zip(("actor", "service"), others_ms, strict=True):
        results[f"{name}_inter_token_ms"] = round(value_ms, 2)
        results[f"{name}_ratio"] = round(value_ms / bare_ms, 3)
    reader.close()
    for process in (bare.process, actor.process):
        process.stdin.close()
        process.wait(30)
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
        case ["actor", cluster_secret]:
            run_actor(bytes.fromhex(cluster_secret))
        case ["plain", pace_s]:
            run_plain(float(pace_s))
        case ["bare"]:
            run_bare()


if __name__ == "__main__":
    main()
