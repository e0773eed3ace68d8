"""A running `eyrie serve` as the tests of its API use it: clients, metrics, logs."""

import os
import re
import tempfile
import time
from pathlib import Path

import httpx
import openai

from tests.e2e.eyrie_process import EyrieProcess


class OpenAIService:
    """Talks to one EyrieProcess that is ready."""

    def __init__(self, eyrie: EyrieProcess):
        self.eyrie = eyrie
        self.url = eyrie.url()

    def client(self, api_key="none"):
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=api_key, max_retries=0, timeout=120)

    def async_client(self, api_key="none"):
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key=api_key, max_retries=0, timeout=120)

    def log(self):
        return "\n".join(self.eyrie.stderr)

    def all_logs(self):
        """Return stderr and every text file of the run's folder, Ray's own logs included."""
        roots = {Path("/tmp"), Path(tempfile.gettempdir())}
        folders = [
            folder
            for root in roots
            for folder in root.glob(f"eyrie-{os.getuid()}-{self.eyrie.process.pid}-*")
        ]
        texts = [
            file.read_text(errors="replace")
            for folder in folders
            for file in folder.rglob("*")
            if file.is_file() and file.suffix in (".log", ".out", ".err", ".txt", ".json")
        ]
        assert texts, "Ray's logs are elsewhere"
        return [self.log(), *texts]

    def metrics(self):
        """Return rank 0's samples, summed over all labels but those kept: name{state=free} -> value."""
        targets = httpx.get(f"{self.url}/metrics/targets").json()
        (address,) = next(target for target in targets if target["labels"].get("rank") == "0")["targets"]
        samples = {}
        for line in httpx.get(f"http://{address}/metrics").text.splitlines():
            match = re.fullmatch(r"(\w+)(?:\{(.*)\})? (\S+)", line)
            if match is None:
                continue
            kept = re.findall(r'(?:state|finish_reason)="[^"]*"', match[2] or "")
            key = match[1] + "".join(f"{{{label}}}" for label in kept).replace('"', "")
            samples[key] = samples.get(key, 0.0) + float(match[3])
        return samples

    def idle_metrics(self, timeout_s=30.0):
        """Return rank 0's samples once nothing runs or waits there."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            samples = self.metrics()
            if samples["eyrie_running_requests"] == samples["eyrie_waiting_requests"] == 0:
                return samples
            assert time.monotonic() < deadline_s, samples
            time.sleep(0.05)
