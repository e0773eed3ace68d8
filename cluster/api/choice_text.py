"""One choice's text: from the worker's outputs to what may be shown. Runs in the tokens' thread."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from cluster.api.detokenizer import Detokenizer
from cluster.api.stop_strings import StopStrings
from cluster.api.tokenizer import Tokenizer
from workers.protocol import FinishReason, RequestOutput, TokenLogprobs


@dataclass(frozen=True, slots=True)
class TokenText:
    """A token as a user sees it: text (U+FFFD for parts of characters), its bytes and log probability."""

    text: str
    octets: bytes
    logprob: float


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """A generated token with the most likely ones of its place. `offset`: characters of text before it."""

    chosen: TokenText
    top: tuple[TokenText, ...]
    offset: int


@dataclass(frozen=True, slots=True)
class Piece:
    """What one step added to a choice and may be shown now. The last piece carries the finish reason."""

    text: str
    scored: list[ScoredToken] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    @property
    def is_empty(self) -> bool:
        """There is nothing to tell the client."""
        return not (self.text or self.scored or self.finish_reason)


class ChoiceText:
    """Decodes, cuts at stop strings and scores one choice.

    `end_token_ids` are the tokens that end the text without being part of it. Stop strings that would leave
    fewer than `min_tokens` tokens are not looked for.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stops: Sequence[str] = (),
        end_token_ids: frozenset[int] = frozenset(),
        min_tokens: int = 0,
    ) -> None:
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer(tokenizer)
        self._stops = StopStrings(stops)
        self._end_token_ids = end_token_ids
        self._min_tokens = min_tokens
        self._decoded_len = 0
        self._shown_len = 0
        self._held_scores: list[ScoredToken] = []
        self.num_tokens = 0

    @property
    def stopped(self) -> bool:
        """A stop string is complete: the request may be aborted, the choice is finished."""
        return self._stops.stopped

    def feed(self, output: RequestOutput) -> Piece:
        """Take one step's output. Tokens after a stop string, or after the end, do not count."""
        token_ids = output.token_ids
        finish_reason = output.finish_reason
        text = ""
        for place, token_id in enumerate(token_ids):
            self.num_tokens += 1
            is_last = place == len(token_ids) - 1
            if is_last and finish_reason == "stop" and token_id in self._end_token_ids:
                break
            if output.logprobs:
                self._held_scores.append(self._scored(token_id, output.logprobs[place]))
            text += self._show(self._detokenizer.feed(token_id))
            if self.stopped:
                break
        if finish_reason is not None and not self.stopped:
            text += self._show(self._detokenizer.finish())
            if not self.stopped:
                text += self._stops.finish()
        if self.stopped:
            finish_reason = "stop"
        self._shown_len += len(text)
        return Piece(text, self._released_scores(finish_reason), finish_reason)

    def _show(self, decoded: str) -> str:
        self._decoded_len += len(decoded)
        if not decoded or self.num_tokens <= self._min_tokens:
            return decoded
        return self._stops.feed(decoded)

    def _released_scores(self, finish_reason: FinishReason | None) -> list[ScoredToken]:
        """Return the scores of tokens whose text is shown: none inside a stop string, none held back.

        A token that completes no character goes with the next that does.
        """
        if finish_reason is not None and not self.stopped:
            released, self._held_scores = self._held_scores, []
            return released
        count = 0
        while count < len(self._held_scores) and self._held_scores[count].offset < self._shown_len:
            count += 1
        released, self._held_scores = self._held_scores[:count], self._held_scores[count:]
        return released

    def _scored(self, token_id: int, logprobs: TokenLogprobs) -> ScoredToken:
        top = tuple(map(self._token_text, logprobs.top_ids, logprobs.top_logprobs))
        return ScoredToken(self._token_text(token_id, logprobs.logprob), top, self._decoded_len)

    def _token_text(self, token_id: int, logprob: float) -> TokenText:
        octets = self._tokenizer.token_bytes(token_id)
        return TokenText(octets.decode("utf-8", "replace"), octets, logprob)
