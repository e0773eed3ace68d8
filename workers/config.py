"""WorkerConfig: every option of one TP group's workers, validated once, frozen ever after. No torch."""

from typing import Annotated, Literal, Self

from pydantic import (
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)
from pydantic.dataclasses import dataclass

_STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

PositiveInt = Annotated[int, Field(ge=1)]

_MAX_DRAFTS = 16
_MAX_TREE_NODES = 62
"""What a token sees of a tree fits into one word."""
_AUTO_DRAFT_LENS = (1, 2, 3, 5)
"""What `auto` chooses from: each has prepared steps of its own."""


def _draft_tokens(value: object, handler: ValidatorFunctionWrapHandler) -> object:
    """Say in one sentence what neither of both kinds allows."""
    try:
        return handler(value)
    except ValidationError:
        raise ValueError(f"found {value!r}, allowed are `auto` and 1 to {_MAX_DRAFTS}") from None


@dataclass(frozen=True, config=_STRICT)
class WorkerConfig:
    """Options of one replica. Shared by all its ranks; fields that change KV enter its namespace."""

    model: str = "smollm2-135m"
    """A directory, a .gguf file, a hub id or an alias."""
    load_format: Literal["auto", "dummy"] = "auto"
    """Where weights come from; `auto`: the model's files; `dummy`: seeded random ones in its shape."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of weights and KV; `auto`: the checkpoint's own, bfloat16 for quantised files."""
    device: Literal["cpu", "cuda"] = "cpu"
    """What the workers compute on."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of dummy weights, and of requests that bring none."""
    tp_size: PositiveInt = 1
    """Ranks (worker processes) that share each replica's model."""
    page_size: Literal[1, 2, 4, 8, 16, 32, 64] = 16
    """Tokens a KV page holds; shared prefixes are found in whole pages."""
    num_pages: PositiveInt | None = None
    """KV pages each rank has. Not given: as many as `kv_gb` holds."""
    kv_gb: Annotated[float, Field(gt=0, le=1e6)] | None = None
    """Device memory for KV pages on each rank, GiB. Not given: 0.5 on cpu; on cuda what `device_memory_ratio`
    leaves beside weights and work space."""
    device_memory_ratio: Annotated[float, Field(gt=0, le=1)] = 0.9
    """On cuda without `kv_gb` and `num_pages`: the share of each device's memory for weights, KV pages and
    the work space of steps; graphs and other processes take from the rest."""
    max_context_len: PositiveInt | None = None
    """Most tokens of a request, prompt and answer together. Not given: the model's context, or less where
    the KV pages hold less."""
    max_running_requests: Annotated[int, Field(ge=1, le=4096)] = 32
    """Most requests of a replica that generate at the same time."""
    max_waiting_requests: Annotated[int, Field(ge=0)] = 256
    """Most requests that wait for a place in a replica; more are answered with 429."""
    max_tokens_per_step: Annotated[int, Field(ge=1)] = 256
    """Token budget of a step: decodes first, prefill chunks fill the rest."""
    itl_target_ms: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Milliseconds between two tokens of a running answer that prompts may cause: their chunks are as long as
    that leaves time for, by what steps were measured to take, and a long prompt leaves half of each step to
    shorter ones behind it. Not given: chunks fill `max_tokens_per_step`, first come, first served."""
    overlap_depth: Literal[0, 1] | None = None
    """Steps that are planned and launched while one runs; with 0, and behind a step that guesses tokens or
    checks guesses, a step is planned once the last one's tokens are known. Answers are the same. Not given: 1
    on cuda, 0 on cpu, where the host is the device."""
    attention_backend: Literal["auto", "reference", "native", "flashinfer"] = "auto"
    """`native`: the compiled CPU kernels, for attention and all else they know; `flashinfer`: FlashInfer's
    kernels, on cuda in float16 and bfloat16; `reference`: plain torch; `auto`: the device's kernels where
    they compile, else reference."""
    draft: str | None = None
    """A draft model that guesses tokens ahead, which the model then checks together: the same answers, as far
    as sums of more rows round alike, sooner. A directory, a hub id or an alias. Not given: none."""
    draft_tokens: Annotated[
        Literal["auto"] | Annotated[int, Field(ge=1, le=_MAX_DRAFTS)], WrapValidator(_draft_tokens)
    ] = "auto"
    """Tokens that the draft guesses at a time; `auto`: 5 at most, as many as bring the most tokens a second
    by what was measured of guesses and of steps with as many answers, and none while guessing would lose."""
    draft_topk: Annotated[int, Field(ge=1, le=8)] = 1
    """Guesses that are followed for each of `draft_tokens`: 1, a chain; more, a tree of the likeliest, of
    which `draft_topk` times as many tokens are checked. More of what is guessed is right, and checking costs
    more: for few requests at a time. Trees are checked in steps without prompts."""
    draft_attention_backend: Literal["auto", "reference", "native", "flashinfer"] = "auto"
    """The draft's, as `attention_backend`; `auto`: the compiled kernels where the model uses them, too."""
    graphs: bool = True
    """Replay prepared steps; off: every step runs eager, for comparison."""
    graph_batch_sizes: tuple[PositiveInt, ...] | None = None
    """Batch sizes with a prepared decode step. Not given: chosen from `max_running_requests`."""
    graph_token_sizes: tuple[Annotated[int, Field(ge=2)], ...] | None = None
    """Numbers of tokens with a prepared step that prefills, beside decodes or alone. Not given: on cuda
    chosen from `max_tokens_per_step`, on cpu none."""
    prefix_caching: bool = True
    """Keep the KV pages of finished requests for later ones that begin alike."""
    write_policy: Literal["write_through", "write_through_selective", "write_back"] = "write_through"
    """When a page is saved to the host cache: once it is complete, once it is used again, or once it would be
    evicted from the device."""
    prefetch_policy: Literal["best_effort", "wait_complete", "timeout"] = "wait_complete"
    """How long a queued request waits while pages of its prompt are fetched from other nodes or the remote
    store: not at all; until they are there, but no longer than computing them would take, half a second at
    least; or `prefetch_timeout_s`. Nothing is fetched that is thought to be computed sooner, and
    others go ahead meanwhile."""
    prefetch_timeout_s: Annotated[float, Field(ge=0)] = 0.5
    """Under `timeout`: seconds a request waits, beside what its pages are allowed, 10 ms for a megabyte."""
    verify_pages: Literal["always", "once"] = "once"
    """Checksum pages on every load from the host cache, or once after each was written."""
    kv_sanitizer: bool = False
    """Poison freed pages and prove, each step, that every page read is the right one."""
    checked: bool = False
    """Check, each step, bounds, owner and order of every page index that it reads, writes, loads or saves:
    the sanitizer's checks of indices, without those of bytes."""
    one_shot_sums: bool = True
    """On cuda with several ranks: make small sums over them, those of decode steps, in one kernel that writes
    to the peers' memory; off, or where that cannot be mapped: by NCCL."""
    num_threads: Annotated[int, Field(ge=0)] = 0
    """Compute threads of a rank on CPU; 0: cores shared fairly among the ranks of the node."""
    collective_timeout_s: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 60.0
    """Seconds a rank waits for its peers, at start and in a step, before it takes them for lost."""

    @model_validator(mode="after")
    def _check_draft(self) -> Self:
        if self.draft is None:
            return self
        if self.draft_topk > 1 and self.max_drafts > _MAX_TREE_NODES:
            raise ValueError(
                f"draft_topk: found {self.draft_topk} with draft_tokens={self.draft_tokens}, a tree of"
                f" {self.max_drafts} tokens; allowed are {_MAX_TREE_NODES}: lower either"
            )
        if self.draft_topk * self.draft_lens[0] >= self.max_tokens_per_step:
            raise ValueError(
                f"draft_tokens: found {self.draft_tokens} with draft_topk={self.draft_topk}, of which"
                f" max_tokens_per_step={self.max_tokens_per_step} has no room to check any beside the token"
                " before them: lower either, or raise max_tokens_per_step"
            )
        return self

    @property
    def depth(self) -> int:
        """Steps that may be in flight when another is planned: `overlap_depth`, or what holds without it."""
        if self.overlap_depth is not None:
            return self.overlap_depth
        return 1 if self.device == "cuda" else 0

    @property
    def draft_lens(self) -> tuple[int, ...]:
        """How many tokens ahead may be drafted at a time, ascending; none without a draft."""
        if self.draft is None:
            return ()
        return _AUTO_DRAFT_LENS if self.draft_tokens == "auto" else (self.draft_tokens,)

    @property
    def max_drafts(self) -> int:
        """Most tokens that a row brings to be verified, of a tree all nodes: 0 without a draft."""
        return self.draft_topk * max(self.draft_lens, default=0)

    @property
    def draft_window(self) -> int:
        """Places behind its tokens that a running request needs: for drafts being verified, and for those
        drafted in the same step, which go on behind the right ones of these."""
        if not self.draft_lens:
            return 0
        #   drafting   | right ones | chosen | what is followed at each depth but the last |
        drafting = self.draft_lens[-1] + 1 + (self.draft_lens[-1] - 1) * self.draft_topk
        return max(self.max_drafts, drafting)
