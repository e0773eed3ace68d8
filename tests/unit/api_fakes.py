"""Fakes and a small model for the API's tests: a router whose workers follow a script, a byte-level BPE."""

import asyncio
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import msgspec
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as LibraryTokenizer

from cluster.api.admin import CacheAdmin
from cluster.api.auth import AdminKeys, Authenticator
from cluster.api.chat_template import ChatTemplate
from cluster.api.ports import RequestSummary, ScrapeTarget
from cluster.api.prompts import ServedModel
from cluster.api.request_ids import RequestIds
from cluster.api.service import Service
from cluster.api.tokenizer import Tokenizer
from workers.protocol import FinishReason, RequestOutput, SubmitRequest, TokenLogprobs

TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['content'] == 'explode' %}{{ raise_exception('no explosions') }}{% endif %}"
    "<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
CORPUS = ["the cat sat on the mat and said hello world", "naïve café 日本語 🎉👩‍👩‍👧", "a b c d e f"] * 20


def library_tokenizer() -> LibraryTokenizer:
    """A byte-level BPE with a few merges, two special tokens and one added token that is plain text."""
    tokenizer = LibraryTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<|end|>", "<|start|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("plain added", special=False)])
    return tokenizer


def small_model(context_len: int = 128) -> ServedModel:
    text = library_tokenizer().to_str()
    tokenizer = Tokenizer(text)
    return ServedModel(
        name="tiny",
        tokenizer=tokenizer,
        chat_template=ChatTemplate(TEMPLATE, {}),
        context_len=context_len,
        vocab_size=400,
        end_token_ids=frozenset({0}),
    )


class FakeStream:
    """Outputs pushed by the test, or by a script, one by one."""

    def __init__(self, request: SubmitRequest) -> None:
        self.request = request
        self.outputs: asyncio.Queue[RequestOutput | None] = asyncio.Queue()
        self.aborted: list[FinishReason] = []
        self.closed = False
        self.finished = False

    def push(self, *outputs: RequestOutput) -> None:
        for output in outputs:
            self.outputs.put_nowait(output)

    def __aiter__(self) -> "FakeStream":
        return self

    async def __anext__(self) -> RequestOutput:
        if self.finished:
            raise StopAsyncIteration
        output = await self.outputs.get()
        assert output is not None
        self.finished = output.finish_reason is not None
        return output

    async def abort(self, finish_reason: FinishReason = "abort") -> None:
        if self.finished or self.aborted:
            return
        self.aborted.append(finish_reason)
        self.push(self.output(finish=finish_reason))

    async def aclose(self) -> None:
        if not self.finished:
            await self.abort()
        self.closed = True

    def output(
        self,
        token_ids: Sequence[int] = (),
        finish: FinishReason | None = None,
        logprobs: Sequence[TokenLogprobs] = (),
        cached: int = 0,
        error: str | None = None,
        error_code: str | None = None,
    ) -> RequestOutput:
        return RequestOutput(
            self.request.request_id, list(token_ids), list(logprobs), finish, cached, error, error_code
        )


Script = Callable[[FakeStream], Iterable[RequestOutput]]


class FakeRouter:
    """Gives every request a stream and runs the script over it at once."""

    def __init__(self, script: Script | None = None) -> None:
        self.script = script
        self.streams: list[FakeStream] = []
        self.submitted = asyncio.Semaphore(0)
        self.submit_error: Exception | None = None
        self.not_ready: str | None = None
        self.max_context_len: int | None = None

    async def submit(self, request: SubmitRequest) -> FakeStream:
        if self.submit_error is not None:
            raise self.submit_error
        stream = FakeStream(request)
        self.streams.append(stream)
        if self.script is not None:
            stream.push(*self.script(stream))
        self.submitted.release()
        return stream

    def ready(self) -> str | None:
        return self.not_ready


@dataclass
class FakeRecorder:
    """Remembers what the API counts."""

    summaries: list[RequestSummary] = field(default_factory=list)
    answers: list[tuple[str, int]] = field(default_factory=list)
    first_tokens: list[float] = field(default_factory=list)
    gaps: list[tuple[float, int]] = field(default_factory=list)

    def first_token(self, latency_s: float) -> None:
        self.first_tokens.append(latency_s)

    def next_tokens(self, latency_s: float, num_tokens: int) -> None:
        self.gaps.append((latency_s, num_tokens))

    def finished(self, summary: RequestSummary) -> None:
        self.summaries.append(summary)

    def answered(self, route: str, status: int) -> None:
        self.answers.append((route, status))

    def exposition(self) -> tuple[bytes, str]:
        return b"eyrie_fake 1\n", "text/plain; version=0.0.4"


def says(
    text: str, *, finish: FinishReason = "stop", cached: int = 0, step: int = 1, num_drafts: int = 0
) -> Script:
    """A worker that generates `text`, `step` tokens at a time, then its end token or the given finish.

    Of `num_drafts` drafts in each step, all but the last of its tokens were right.
    """

    def script(stream: FakeStream) -> Iterable[RequestOutput]:
        yield stream.output()
        token_ids = library_tokenizer().encode(text).ids + ([0] if finish == "stop" else [])
        num_top = stream.request.sampling.num_logprobs
        for start in range(0, len(token_ids), step):
            ids = token_ids[start : start + step]
            is_last = start + step >= len(token_ids)
            logprobs = [] if num_top is None else [_logprobs(token_id, num_top) for token_id in ids]
            output = stream.output(ids, finish if is_last else None, logprobs, cached)
            num_right = min(num_drafts, len(ids) - 1)
            yield msgspec.structs.replace(
                output, num_accepted_drafts=num_right, num_rejected_drafts=num_drafts - num_right
            )

    return script


def _logprobs(token_id: int, num_top: int) -> TokenLogprobs:
    top = [(token_id + place) % 300 for place in range(num_top)]
    return TokenLogprobs(-0.5, top, [-0.5 - place for place in range(num_top)])


def make_service(
    router: FakeRouter,
    *,
    api_keys: Sequence[str] = (),
    context_len: int = 128,
    boot_id: str = "b00t",
    cache_admin: CacheAdmin | None = None,
) -> tuple[Service, FakeRecorder]:
    recorder = FakeRecorder()
    service = Service(
        model=small_model(context_len),
        router=router,
        recorder=recorder,
        scrape_targets=lambda: [ScrapeTarget("127.0.0.1:9000", {"replica": "r0"})],
        authenticator=Authenticator(api_keys, b"cluster secret"),
        cache_admin=cache_admin or CacheAdmin(AdminKeys((), b"secret"), {}, b"secret", lambda store: None),
        request_ids=RequestIds(boot_id),
        started_at_s=1_700_000_000.0,
        wall_clock=lambda: 1_800_000_000.0,
    )
    return service, recorder


def events(body: str) -> list[dict[str, object]]:
    """The records of an SSE body; it must end with the end mark."""
    blocks = [block for block in body.split("\n\n") if block]
    assert all(block.startswith("data: ") for block in blocks)
    assert blocks[-1] == "data: [DONE]"
    return [json.loads(block.removeprefix("data: ")) for block in blocks[:-1]]
