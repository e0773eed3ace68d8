"""A tiny model, and plans written by hand: a decider so simple that a failing engine test is the engine's."""

from pathlib import Path

import torch

from cache_service.keys import NamespaceDigest, page_keys
from workers.card import ModelCard
from workers.config import WorkerConfig
from workers.engine.engine import Engine
from workers.engine.mechanisms import ALL_ON, Mechanisms
from workers.models.config import ModelConfig
from workers.parallel import TPGroup
from workers.plan import (
    BatchPlan,
    CloseSlot,
    CompletePages,
    FreePages,
    OpenSlot,
    OwnPages,
    PlanOp,
    RelocationVersion,
    SetRow,
    StepOutput,
)
from workers.protocol import SamplingParams

torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other

GREEDY = SamplingParams(temperature=0.0)
NAMESPACE = NamespaceDigest(bytes(16))
VOCAB_SIZE = 101


def tiny_card(**changes: object) -> ModelCard:
    fields: dict[str, object] = {
        "family": "llama",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "max_context_len": 256,
        "dtype": "float32",
        **changes,
    }
    return ModelCard(
        name="tiny",
        source=Path("tiny"),
        hub=None,
        config=ModelConfig(**fields),  # type: ignore[arg-type]
        tokenizer_json="",
        chat_template=None,
        special_tokens=(),
        bos_token_id=None,
        eos_token_id=None,
        end_token_ids=(),
    )


def tiny_engine(mechanisms: Mechanisms = ALL_ON, card: ModelCard | None = None, **options: object) -> Engine:
    fields: dict[str, object] = {
        "load_format": "dummy",
        "page_size": 4,
        "num_pages": 40,
        "max_running_requests": 6,
        "kv_sanitizer": True,
        **options,
    }
    config = WorkerConfig(**fields)  # type: ignore[arg-type]
    return Engine(config, card or tiny_card(), TPGroup.single(), mechanisms)


class PlanLog:
    """Rank 0's part: hands out pages, writes ops and rows, takes the sampled tokens in."""

    def __init__(self, page_size: int = 4, num_pages: int = 40) -> None:
        self.page_size = page_size
        self.free = list(range(num_pages, 0, -1))
        self.generations = [0] * (num_pages + 1)
        self.version = RelocationVersion(7, 0)
        self.step = 0
        self.ops: list[PlanOp] = []
        self.tokens: dict[int, list[int]] = {}
        self.num_computed: dict[int, int] = {}
        self.pages: dict[int, list[int]] = {}

    def open(self, slot: int, token_ids: list[int], sampling: SamplingParams = GREEDY) -> None:
        self.tokens[slot], self.num_computed[slot], self.pages[slot] = list(token_ids), 0, []
        self.ops.append(OpenSlot(slot, sampling, 0, len(token_ids), list(token_ids)))

    def close(self, slot: int, num_kept: int = 0) -> None:
        """End a slot; its first `num_kept` pages stay, for others read them."""
        self.ops.append(CloseSlot(slot))
        self.give_back(self.pages.pop(slot)[num_kept:])
        del self.tokens[slot], self.num_computed[slot]

    def give_back(self, pages: list[int]) -> None:
        self.ops.append(FreePages(list(pages)))
        self._relocate()
        self.free += pages

    def own(self, num_pages: int) -> tuple[list[int], list[int]]:
        pages = [self.free.pop() for _ in range(num_pages)]
        for page in pages:
            self.generations[page] += 1
        generations = [self.generations[page] for page in pages]
        self.ops.append(OwnPages(pages, generations))
        self._relocate()
        return pages, generations

    def complete(self, slot: int) -> None:
        """Name the slot's whole pages."""
        keys = page_keys(NAMESPACE, self.tokens[slot][: self.num_computed[slot]], self.page_size)
        self.ops.append(CompletePages(self.pages[slot][: len(keys)], [bytes(key) for key in keys]))

    def share(self, slot: int, pages: list[int]) -> None:
        """Start an open slot on complete pages: its first tokens are theirs."""
        keys = page_keys(NAMESPACE, self.tokens[slot], self.page_size)[: len(pages)]
        generations = [self.generations[page] for page in pages]
        self.ops.append(SetRow(slot, 0, list(pages), generations, [bytes(key) for key in keys]))
        self.pages[slot] = list(pages)
        self.num_computed[slot] = len(pages) * self.page_size

    def plan_ahead(self, *slots: int) -> BatchPlan:
        """Plan the next token of slots, which the step before is still sampling."""
        starts = [self.num_computed[slot] for slot in slots]
        for slot, start in zip(slots, starts, strict=True):
            self._reserve(slot, start + 1)
            self.num_computed[slot] = start + 1
        self.step += 1
        ops, self.ops = self.ops, []
        rows = list(range(len(slots)))
        ones = [1] * len(slots)
        return BatchPlan(self.step, self.version, ops, list(slots), starts, ones, [], rows, len(slots))

    def plan(self, **lens: int) -> BatchPlan:
        """Plan rows: `s3=5` runs the next five tokens of slot 3; a row that reaches its end is sampled."""
        slots = [int(name[1:]) for name in lens]
        starts, token_ids, sampled = [], [], []
        for row, (slot, length) in enumerate(zip(slots, lens.values(), strict=True)):
            start = self.num_computed[slot]
            starts.append(start)
            token_ids += self.tokens[slot][start : start + length]
            self._reserve(slot, start + length)
            self.num_computed[slot] = start + length
            if start + length == len(self.tokens[slot]):
                sampled.append(row)
        self.step += 1
        ops, self.ops = self.ops, []
        return BatchPlan(self.step, self.version, ops, slots, starts, list(lens.values()), token_ids, sampled)

    def take(self, plan: BatchPlan, output: StepOutput) -> None:
        for row, token_id in zip(plan.sampled, output.token_ids, strict=True):
            self.tokens[plan.slots[row]].append(token_id)

    def run(self, engine: Engine, **lens: int) -> StepOutput:
        plan = self.plan(**lens)
        output = engine.run(plan)
        self.take(plan, output)
        return output

    def _reserve(self, slot: int, num_tokens: int) -> None:
        num_held = len(self.pages[slot])
        if (num_missing := -(-num_tokens // self.page_size) - num_held) > 0:
            pages, generations = self.own(num_missing)
            self.ops.append(SetRow(slot, num_held, pages, generations, []))
            self.pages[slot] += pages

    def _relocate(self) -> None:
        self.version = RelocationVersion(self.version.incarnation, self.version.counter + 1)


def generate(
    engine: Engine, prompts: list[list[int]], num_tokens: int, chunk_len: int = 256
) -> list[list[int]]:
    """Run prompts together, each in its own slot, prefill in chunks; return the generated tokens."""
    log = PlanLog(engine.layout.page_size, engine.num_pages)
    for slot, prompt in enumerate(prompts):
        log.open(slot, prompt)
    while any(len(log.tokens[slot]) - len(prompt) < num_tokens for slot, prompt in enumerate(prompts)):
        lens = {}
        for slot, prompt in enumerate(prompts):
            if len(log.tokens[slot]) - len(prompt) < num_tokens:
                lens[f"s{slot}"] = min(chunk_len, len(log.tokens[slot]) - log.num_computed[slot])
        log.run(engine, **lens)
    return [log.tokens[slot][len(prompt) :] for slot, prompt in enumerate(prompts)]
