"""Runs `eyrie serve` as a user does, in a process group of its own, and looks for what it leaves behind."""

import contextlib
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

from cache_service.curve import SecretFileError, read_cluster_secret
from cache_service.identity import cluster_id_of
from workers.card import load_card

START_S = 240.0


def tiny_model(folder: Path) -> Path:
    """Write a 2-layer model's card with SmolLM2's tokenizer; its weights are dummies."""
    card = load_card("smollm2-135m")
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": card.vocab_size,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "bos_token_id": card.bos_token_id,
        "eos_token_id": card.eos_token_id,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(card.tokenizer_json)
    tokenizer_config = {"chat_template": card.chat_template, **dict(card.special_tokens)}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    return folder


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def is_listening(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex(("127.0.0.1", port)) == 0


class EyrieProcess:
    """`eyrie serve` with these arguments; use as a context manager, which kills what is left."""

    def __init__(self, *arguments: str, environment: dict[str, str] | None = None):
        self.shared_memory_before = _shared_memory()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "cluster", "serve", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )
        self.stdout: list[str] = []
        self.stderr: list[str] = []
        self.family: dict[int, psutil.Process] = {}
        self.cluster_id = ""
        self._ready: queue.Queue[str | None] = queue.Queue()
        self._readers = [
            threading.Thread(target=self._read, args=(stream, lines), daemon=True)
            for stream, lines in ((self.process.stdout, self.stdout), (self.process.stderr, self.stderr))
        ]
        for reader in self._readers:
            reader.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.remember_family()
        for process in self.family.values():
            if process.is_running():
                process.kill()
        self.process.kill()
        self.process.wait(10)
        for reader in self._readers:
            reader.join(10)
        self.process.stdout.close()
        self.process.stderr.close()

    def _read(self, stream, lines):
        for line in stream:
            lines.append(line.rstrip("\n"))
            if stream is self.process.stdout and line.startswith("ready "):
                self._ready.put(line.split()[1])
        if stream is self.process.stdout:
            self._ready.put(None)

    def url(self) -> str:
        """Wait for the ready line."""
        url = self._ready.get(timeout=START_S)
        assert url is not None, "\n".join(self.stderr[-40:])
        self.remember_family()
        return url

    def remember_family(self):
        """Note all processes under it and its cluster's name, to look for what is theirs once it is gone."""
        for folder in _run_folders(self.process.pid):
            with contextlib.suppress(OSError, SecretFileError):
                self.cluster_id = cluster_id_of(read_cluster_secret(folder / "cluster.secret"))
        try:
            for process in psutil.Process(self.process.pid).children(recursive=True):
                self.family[process.pid] = process
        except psutil.NoSuchProcess:
            pass

    def members(self, title: str) -> list[psutil.Process]:
        """Processes of the service whose title begins so (`ray::Worker`, `ray::ApiServer`)."""
        self.remember_family()
        found = []
        for process in self.family.values():
            try:
                if process.cmdline() and process.cmdline()[0].startswith(title):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def terminate(self):
        self.remember_family()
        self.process.send_signal(signal.SIGTERM)

    def interrupt(self):
        """What a terminal does on Ctrl-C: SIGINT to the whole group."""
        self.remember_family()
        os.killpg(self.process.pid, signal.SIGINT)

    def terminate_group(self):
        """What a service manager does: SIGTERM to every process at once."""
        self.remember_family()
        os.killpg(self.process.pid, signal.SIGTERM)

    def terminate_each(self):
        """What another one does: SIGTERM to each process, whatever its group."""
        self.remember_family()
        for process in self.family.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()
        self.process.send_signal(signal.SIGTERM)

    def wait(self, timeout_s: float = 60.0) -> int:
        code = self.process.wait(timeout_s)
        for reader in self._readers:
            reader.join(10)
        return code

    def leftovers(self, timeout_s: float = 15.0) -> list[str]:
        """Processes, shared memory and folders that are still there."""
        deadline = time.monotonic() + timeout_s
        while True:
            left = [f"process {p.pid}" for p in self.family.values() if _lives(p)]
            left += [str(path) for path in self._shared_memory()]
            left += [str(path) for path in _run_folders(self.process.pid)]
            if not left or time.monotonic() > deadline:
                return left
            time.sleep(0.1)

    def _shared_memory(self) -> list[Path]:
        """Files that came meanwhile, but for the arenas of others."""
        new = _shared_memory() - self.shared_memory_before
        return [path for path in new if path.suffix != ".arena" or self.cluster_id in path.name]


def _shared_memory() -> set[Path]:
    return {path for path in Path("/dev/shm").iterdir() if "eyrie" in path.name or "plasma" in path.name}


def _run_folders(pid: int) -> list[Path]:
    roots = {Path(tempfile.gettempdir()), Path("/tmp")}
    return [path for root in roots for path in root.glob(f"eyrie-{os.getuid()}-{pid}-*")]


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
