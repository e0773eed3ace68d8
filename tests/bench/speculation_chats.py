"""Chats for bench_speculation: held-out prompts, asked together, and what became of the drafts in them."""

import json
from collections import Counter
from pathlib import Path
from random import Random

from tests.bench.gpu_rank import BenchRank, prompt
from tests.bench.gpu_shapes import SHAPES
from workers.card import load_card
from workers.chat_environment import Message
from workers.draft_training.chat import Chat
from workers.protocol import FetchHint, Received, RequestId, RequestOutput, SamplingParams, SubmitRequest

HELD_OUT = Path(__file__).parent / "held_out_prompts.jsonl"
"""Chats that no draft was trained on, a JSON object with `messages` a line, the last of them the user's."""
MAX_PROMPT_LEN = 512
_SHAPE_PROMPT_LEN = 60
_NUM_CHOSEN = 256
_SEED = "chats to speculate on"


def chat_prompts(model: str, file: Path) -> list[list[int]]:
    """Return the chats of a file as prompts, in an order of their own; without the file, chosen turns of
    chitchat-dataset; for a model that is no more than a shape, random tokens."""
    random = Random(_SEED)
    if model in SHAPES:
        vocab_size = SHAPES[model]["vocab_size"]
        return [prompt(random, _SHAPE_PROMPT_LEN, vocab_size) for _ in range(_NUM_CHOSEN)]
    if file.exists():
        chats = [json.loads(line)["messages"] for line in file.read_text().splitlines()]
    else:
        chats = _chitchat(random)
    chat_of = Chat(load_card(model))
    random.shuffle(chats)
    prompts = [
        chat_of.prompt(tuple(Message(each["role"], each["content"]) for each in chat)) for chat in chats
    ]
    return [tokens for tokens in prompts if len(tokens) <= MAX_PROMPT_LEN]


def _chitchat(random: Random) -> list[list[dict[str, str]]]:
    from chitchat_dataset import Dataset

    dataset = Dataset()
    chats = []
    for name in random.sample(sorted(dataset), _NUM_CHOSEN):
        turns = [" ".join(each["text"] for each in turn) for turn in dataset[name]["messages"]]
        turns = [turn for turn in turns if turn][:3]
        if len(turns) == 3:
            roles = ("user", "assistant", "user")
            chats.append([{"role": role, "content": text} for role, text in zip(roles, turns, strict=True)])
    return chats


class Chats:
    """Clients that ask all at once, greedily, for `num_tokens` each.

    Tokens count from when all have begun to be answered until the first has ended.
    """

    def __init__(
        self, name: str, prompts: list[list[int]], num_tokens: int, hints: list[list[FetchHint]] | None = None
    ) -> None:
        sampling = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
        self._waiting = [
            SubmitRequest(
                RequestId(f"{name}/{number}"), tokens, sampling, hints=hints[number] if hints else []
            )
            for number, tokens in enumerate(prompts)
        ]
        self._num_left = self._num_asked = len(prompts)
        self._silent = {submit.request_id for submit in self._waiting}
        self._began_s = self._ended_s = 0.0
        self.num_tokens = 0

    @property
    def are_done(self) -> bool:
        return not self._num_left

    def ask(self, now_s: float) -> list[Received]:
        asked, self._waiting = self._waiting, []
        return list(asked)

    def wait_s(self, now_s: float) -> float:
        return 0.0

    def take(self, outputs: list[RequestOutput], now_s: float) -> None:
        if self._silent and outputs:
            self._silent -= {output.request_id for output in outputs if output.token_ids}
            self._began_s = now_s
        elif self._num_left == self._num_asked:
            self.num_tokens += sum(len(output.token_ids) for output in outputs)
            self._ended_s = now_s
        self._num_left -= sum(output.finish_reason is not None for output in outputs)

    @property
    def seconds(self) -> float:
        return self._ended_s - self._began_s


class Acceptance:
    """What became of drafts, and how steps ran, on one rank since this was made."""

    def __init__(self, rank: BenchRank) -> None:
        self._rank = rank
        self._lengths = Counter(rank.scheduler.stats.accept_lengths)
        self._steps = Counter(rank.engine.graph_steps)
        self._prefix_tokens = Counter(rank.scheduler.stats.prefix_tokens)

    def length(self) -> float | None:
        """Return the mean accept length, the token sampled behind right drafts counted; None: no drafts."""
        found = Counter(self._rank.scheduler.stats.accept_lengths) - self._lengths
        num_tokens = sum(length * count for (_, length), count in found.items())
        return num_tokens / found.total() if found else None

    def found_ratio(self, origin: str) -> float:
        """Return the part of prompts' tokens that was found at `origin`, or computed."""
        found = Counter(self._rank.scheduler.stats.prefix_tokens) - self._prefix_tokens
        return round(found[origin] / found.total(), 3)

    def replayed(self) -> Counter[tuple[str, bool]]:
        """Return steps, and with a draft its passes, by mode and by whether they were replayed."""
        found: Counter[tuple[str, bool]] = Counter()
        for (mode, outcome), count in (Counter(self._rank.engine.graph_steps) - self._steps).items():
            found[mode, outcome != "eager"] += count
        return found
