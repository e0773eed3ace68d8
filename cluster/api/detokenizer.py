"""Token ids back to text, one at a time, never splitting a character."""

import codecs

from cluster.api.tokenizer import Tokenizer


class Detokenizer:
    """Text of one choice as its tokens come. What it returns adds up to the full decode of all tokens.

    Bytes that do not yet make a character wait for the next token; bytes that never will become U+FFFD.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token_id: int) -> str:
        """Take the next token, return the characters it completes; special tokens have no text."""
        if self._tokenizer.is_special(token_id):
            return ""
        return self._utf8.decode(self._tokenizer.token_bytes(token_id))

    def finish(self) -> str:
        """Return U+FFFD for a character cut off at the end, else nothing."""
        return self._utf8.decode(b"", final=True)
