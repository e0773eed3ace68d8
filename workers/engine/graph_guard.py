"""GraphGuard: the one place that decides how a step runs, and the count of why. No torch."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from workers.plan import Mode

StepPart = Mode | Literal["draft", "draft_extend"]
"""What is counted: a step by its mode, with a draft its two passes too."""
Outcome = Literal["replay", "replay_after_load", "eager"]
"""replay_after_load: the replay had to come after a LOAD in flight of a page that it reads. Loading is no
reason to run eager (I5)."""
EagerReason = Literal["no_bucket", "mixed", "disabled", "capture_failed", "unsupported"]
"""no_bucket: more rows or tokens than the largest bucket; mixed: extend and decode rows in one step, where
only decode steps have buckets; disabled: `graphs` is off; capture_failed: the bucket could not be prepared;
unsupported: no graph exists for steps that extend, or none on this device or for this attention."""

MAX_CAPTURED_ROWS = 512
MAX_CAPTURED_TOKENS = 1024
"""Of buckets nobody asked for: a larger step computes for so long that its launches hide behind it."""
_MIN_TOKENS_STEP = 16


@dataclass(frozen=True, order=True)
class Bucket:
    """What one graph computes: `decode`: `size` rows of a token each; `mixed`: `size` tokens in rows of any
    length; `verify`: `size` tokens in rows of few, the logits of all of them."""

    mode: Literal["decode", "verify", "mixed"]
    size: int


@dataclass(frozen=True)
class CaptureStats:
    """What preparing the buckets took at the start. `num_bytes`: of the device's memory, 0 on CPU."""

    num_graphs: int = 0
    seconds: float = 0.0
    num_bytes: int = 0


@dataclass(frozen=True)
class Decision:
    """Either the bucket to replay or the reason to run eager."""

    bucket: Bucket | None
    reason: EagerReason | None


class GraphGuard:
    """Decides by mode and number of rows and tokens alone: the plan's contents, equal on every rank (I1)."""

    def __init__(
        self,
        batch_sizes: Sequence[int],
        enabled: bool,
        supported: bool,
        token_sizes: Sequence[int] = (),
        verify_lens: Sequence[int] = (),
    ) -> None:
        """`verify_lens`: tokens of rows that bring as many drafts as others; none: verifying is not
        prepared."""
        self._verify_lens = verify_lens
        self._batch_sizes = sorted(batch_sizes)
        self._token_sizes = sorted(token_sizes)
        self._enabled = enabled
        self._supported = supported
        self._failed: set[Bucket] = set()
        self.steps: Counter[tuple[StepPart, Outcome]] = Counter()
        self.eager_steps: Counter[tuple[StepPart, EagerReason]] = Counter()

    @property
    def buckets(self) -> list[Bucket]:
        """Return every bucket that may be replayed, in an order that is equal on every rank."""
        if not (self._enabled and self._supported):
            return []
        decode = [Bucket("decode", size) for size in self._batch_sizes]
        verify = [Bucket("verify", size) for size in self._verify_sizes]
        return decode + verify + [Bucket("mixed", size) for size in self._token_sizes]

    @property
    def _verify_sizes(self) -> list[int]:
        return sorted({size * length for size in self._batch_sizes for length in self._verify_lens})

    @property
    def token_sizes(self) -> list[int]:
        """Return the tokens of steps that prefill and are replayed: one in between is padded to the next."""
        return [b.size for b in self.buckets if b.mode == "mixed" and b not in self._failed]

    def mark_failed(self, bucket: Bucket) -> None:
        """Run `bucket`'s steps eager from now on: its capture failed."""
        self._failed.add(bucket)

    def decide(self, mode: Mode, num_rows: int, num_tokens: int, after_load: bool = False) -> Decision:
        """Choose for one step, and count it; whether it comes `after_load` changes its count alone."""
        bucket, reason = self._choose(mode, num_rows, num_tokens)
        self.count(mode, reason, after_load)
        return Decision(bucket, reason)

    def count(self, part: StepPart, reason: EagerReason | None, after_load: bool = False) -> None:
        """Count a pass that was replayed, or ran eager for a `reason`."""
        replay: Outcome = "replay_after_load" if after_load else "replay"
        self.steps[part, "eager" if reason else replay] += 1
        if reason:
            self.eager_steps[part, reason] += 1

    def _choose(self, mode: Mode, num_rows: int, num_tokens: int) -> tuple[Bucket | None, EagerReason | None]:
        if not self._enabled:
            return None, "disabled"
        if not self._supported:
            return None, "unsupported"
        bucket: Bucket | None
        if mode == "decode":
            bucket = self._smallest("decode", self._batch_sizes, num_rows)
        elif mode == "verify":
            if not self._verify_lens:
                return None, "unsupported"
            bucket = self._smallest("verify", self._verify_sizes, num_tokens)
        elif self._token_sizes:
            bucket = self._smallest("mixed", self._token_sizes, num_tokens)
        else:
            return None, "mixed" if mode == "mixed" else "unsupported"
        if bucket is None:
            return None, "no_bucket"
        return (None, "capture_failed") if bucket in self._failed else (bucket, None)

    @staticmethod
    def _smallest(mode: Literal["decode", "verify", "mixed"], sizes: list[int], wanted: int) -> Bucket | None:
        place = bisect_left(sizes, wanted)
        return Bucket(mode, sizes[place]) if place < len(sizes) else None


def default_batch_sizes(max_rows: int) -> tuple[int, ...]:
    """Return buckets 1 .. 8, then a quarter apart: at most a fifth of a step's rows are pads."""
    sizes = [1]
    while sizes[-1] < max_rows:
        sizes.append(min(sizes[-1] + max(1, sizes[-1] // 4), max_rows))
    return tuple(sizes)


def default_token_sizes(max_tokens: int) -> tuple[int, ...]:
    """Return buckets of 16 tokens, then four to a doubling: of more than 64, at most a fifth are pads."""
    sizes = [min(_MIN_TOKENS_STEP, max_tokens)]
    while sizes[-1] < max_tokens:
        power = 1 << (sizes[-1].bit_length() - 1)
        sizes.append(min(sizes[-1] + max(power // 4, _MIN_TOKENS_STEP), max_tokens))
    return tuple(sizes)
