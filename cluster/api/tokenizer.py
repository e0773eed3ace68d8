"""Text to token ids, and the bytes each token stands for. Called in the API process's text threads.

Built from the `tokenizers` library's JSON (workers.card reads it from tokenizer.json or GGUF metadata).
"""

import json
import math
import re
from collections.abc import Sequence

import tokenizers

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>", re.ASCII)


class UnsupportedTokenizerError(Exception):
    """The tokenizer's decoder is none whose tokens stand for bytes of their own."""


class Tokenizer:
    """Encodes text; knows every token's bytes. Immutable, shared between threads."""

    def __init__(self, tokenizer_json: str) -> None:
        self._encoder = tokenizers.Tokenizer.from_str(tokenizer_json)
        self._encoder.no_truncation()
        self._encoder.no_padding()
        spec = json.loads(tokenizer_json)
        pieces = _Pieces(spec.get("decoder"))
        added = self._encoder.get_added_tokens_decoder()
        size = max(self._encoder.get_vocab(with_added_tokens=True).values()) + 1
        self._token_bytes = [
            pieces.to_bytes(token) if (token := self._encoder.id_to_token(token_id)) is not None else b""
            for token_id in range(size)
        ]
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._shrinks = spec.get("normalizer") is not None
        self._max_token_bytes = max(map(len, self._token_bytes))

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return the token ids of `text`; special tokens written in it become themselves.

        Only the batch call of the library releases the interpreter lock.
        """
        (encoding,) = self._encoder.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return list(encoding.ids)

    def min_token_count(self, text: str) -> int:
        """Return a lower bound of the number of tokens of `text`, without encoding it.

        A normalizer may compose characters, to a third of their bytes in Unicode's worst case.
        """
        shrink = 3 if self._shrinks else 1
        return math.ceil(len(text) / (self._max_token_bytes * shrink))

    def token_bytes(self, token_id: int) -> bytes:
        """Return the UTF-8 bytes, perhaps part of a character, that a token stands for.

        Ids that the model has and the tokenizer has not (padding of the embedding) stand for nothing.
        """
        return self._token_bytes[token_id] if token_id < len(self._token_bytes) else b""

    def is_special(self, token_id: int) -> bool:
        """The token steers the model and is not part of any text."""
        return token_id in self._special_ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of whole token ids, special tokens included."""
        return b"".join(map(self.token_bytes, token_ids)).decode("utf-8", "replace")


class _Pieces:
    """Maps vocabulary strings to bytes, as the decoders of byte-level and of sentencepiece BPE do."""

    def __init__(self, decoder: dict[str, object] | None) -> None:
        steps = _decoder_steps(decoder)
        kinds = {step["type"] for step in steps}
        self._byte_of: dict[str, int] | None = None
        self._spaces: str | None = None
        self._has_byte_tokens = "ByteFallback" in kinds
        if kinds == {"ByteLevel"}:
            self._byte_of = _byte_level_alphabet()
        elif kinds <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"} and kinds:
            # Strip and Metaspace drop a space where a whole text begins; a continuation keeps it.
            self._spaces = _space_marker(steps)
        else:
            found = ", ".join(sorted(map(str, kinds))) or "none"
            raise UnsupportedTokenizerError(
                f"the tokenizer's decoder is {found}; supported are ByteLevel, Metaspace, and Replace with "
                "ByteFallback"
            )

    def to_bytes(self, piece: str) -> bytes:
        if self._byte_of is not None:
            octets = [self._byte_of.get(char) for char in piece]
            if None not in octets:
                return bytes(octet for octet in octets if octet is not None)
            return piece.encode()
        byte_token = _BYTE_TOKEN.fullmatch(piece) if self._has_byte_tokens else None
        if byte_token is not None:
            return bytes([int(byte_token[1], 16)])
        return (piece.replace(self._spaces, " ") if self._spaces else piece).encode()


def _decoder_steps(decoder: dict[str, object] | None) -> list[dict[str, object]]:
    if decoder is None:
        return []
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    assert isinstance(steps, list)
    return steps


def _space_marker(steps: list[dict[str, object]]) -> str | None:
    for step in steps:
        if step["type"] == "Metaspace":
            return str(step["replacement"])
        if step["type"] == "Replace":
            pattern = step["pattern"]
            if not isinstance(pattern, dict) or "String" not in pattern or step["content"] != " ":
                raise UnsupportedTokenizerError(
                    f"the tokenizer's decoder replaces {pattern} by {step['content']!r}; "
                    "only a fixed string by a space is supported"
                )
            return str(pattern["String"])
    return None


def _byte_level_alphabet() -> dict[str, int]:
    """Return the byte that each character of a byte-level vocabulary stands for (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    alphabet = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in printable)
    alphabet.update({chr(256 + place): byte for place, byte in enumerate(others)})
    return alphabet
