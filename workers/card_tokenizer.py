"""TextCard: how a model's text becomes tokens and back; and a tokenizer.json built from GGUF metadata.

Called by the readers of `workers.card_directory` and `workers.card_gguf`. No torch.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
)

from workers.models.config import ModelError

_CONTROL, _USER_DEFINED = 3, 4
"""Kinds of token in tokenizer.ggml.token_type: matched whole, and special or not."""

_GPT2_NAMES = ("gpt2", "gpt-2", "default")
_DIGIT_NAMES = ("smollm", "starcoder", "refact", "codeshell", "command-r", "exaone", "minerva-7b")
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {
    "llama3": _LLAMA3_SPLIT,
    "llama-v3": _LLAMA3_SPLIT,
    "llama-bpe": _LLAMA3_SPLIT,
    "smaug-bpe": _LLAMA3_SPLIT,
    "qwen2": _QWEN2_SPLIT,
    "deepseek-r1-qwen": _QWEN2_SPLIT,
    "tekken": _TEKKEN_SPLIT,
}
"""Regular expressions of llama.cpp's unicode splitter, by tokenizer.ggml.pre."""


@dataclass(frozen=True)
class TextCard:
    """What the API needs to turn messages into tokens and tokens into text."""

    tokenizer_json: str
    chat_template: str | None
    special_tokens: tuple[tuple[str, str], ...]
    """("bos_token", "<s>") and the like: what chat templates may name."""
    bos_token_id: int | None
    eos_token_id: int | None
    end_token_ids: tuple[int, ...]
    """Every token that ends a generation, eos_token_id among them."""


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer part of a GGUF file's metadata."""

    path: Path
    model: str
    pre: str
    tokens: Sequence[str]
    token_types: Sequence[int]
    merges: Sequence[str] | None
    scores: Sequence[float] | None
    unk_token: str | None
    bos_token: str | None
    eos_token: str | None
    adds_bos: bool
    adds_eos: bool
    adds_space_prefix: bool


def checked_tokenizer(tokenizer_json: str, path: Path) -> Tokenizer:
    """Return the tokenizer, or raise ModelError naming the file it came from."""
    try:
        return Tokenizer.from_str(tokenizer_json)
    except Exception as error:  # the library raises bare Exception for every malformed file
        raise ModelError(f"{path}: not a tokenizer of the `tokenizers` library: {error}") from error


def build_tokenizer_json(vocabulary: Vocabulary) -> str:
    """Return the tokenizer.json that a GGUF file's metadata describes. Raise ModelError for unknown kinds."""
    if vocabulary.model == "gpt2":
        tokenizer, alphabet = _byte_level(vocabulary), frozenset(_byte_spelling())
    elif vocabulary.model == "llama":
        tokenizer, alphabet = _sentencepiece(vocabulary), None
    else:
        raise ModelError(
            f"{vocabulary.path}: tokenizer.ggml.model is {vocabulary.model!r}; 'gpt2' (byte-level BPE) and "
            "'llama' (SentencePiece BPE) are supported"
        )
    _add_tokens(tokenizer, vocabulary, alphabet)
    _add_post_processor(tokenizer, vocabulary)
    # Compact, with keys in the library's order: the text enters the card's digest.
    return json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False, separators=(",", ":"))


def _byte_level(vocabulary: Vocabulary) -> Tokenizer:
    spelling = _byte_spelling()
    alphabet = set(spelling)
    ids = {
        token if set(token) <= alphabet else "".join(spelling[octet] for octet in token.encode()): index
        for index, token in enumerate(vocabulary.tokens)
    }
    if vocabulary.merges is None:
        raise ModelError(f"{vocabulary.path}: tokenizer.ggml.merges is missing; a 'gpt2' tokenizer needs it")
    merges = _pairs(vocabulary.path, vocabulary.merges)
    tokenizer = Tokenizer(_bpe(vocabulary.path, ids, merges, fuse_unk=False, byte_fallback=False))
    tokenizer.pre_tokenizer = _pre_tokenizer(vocabulary)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _pre_tokenizer(vocabulary: Vocabulary) -> pre_tokenizers.PreTokenizer:
    if vocabulary.pre in _GPT2_NAMES:
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if vocabulary.pre in _DIGIT_NAMES:
        # As in the checkpoint's own tokenizer.json and in llama.cpp. (transformers' GGUF reader knows no
        # 'smollm' and leaves Digits out, so that blanks before a digit are cut differently.)
        return pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    if vocabulary.pre in _SPLITS:
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_SPLITS[vocabulary.pre]), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    known = ", ".join(sorted([*_GPT2_NAMES, *_DIGIT_NAMES, *_SPLITS]))
    raise ModelError(f"{vocabulary.path}: tokenizer.ggml.pre is {vocabulary.pre!r}; supported: {known}")


def _sentencepiece(vocabulary: Vocabulary) -> Tokenizer:
    ids = {token: index for index, token in enumerate(vocabulary.tokens)}
    if vocabulary.merges is not None:
        merges = _pairs(vocabulary.path, vocabulary.merges)
    elif vocabulary.scores is not None:
        merges = _merges_from_scores(ids, vocabulary.scores)
    else:
        raise ModelError(
            f"{vocabulary.path}: a 'llama' tokenizer needs tokenizer.ggml.scores or tokenizer.ggml.merges; "
            "neither is there"
        )
    tokenizer = Tokenizer(
        _bpe(vocabulary.path, ids, merges, fuse_unk=True, byte_fallback=True, unk_token=vocabulary.unk_token)
    )
    prefix = vocabulary.adds_space_prefix
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement="▁", prepend_scheme="first" if prefix else "never", split=False
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return tokenizer


def _merges_from_scores(ids: dict[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Return the merges SentencePiece would make: each split of a token into two tokens, best score first."""
    ranked: list[tuple[float, int, int, str, str]] = []
    for token, index in ids.items():
        splits = [(token[:i], token[i:]) for i in range(1, len(token))]
        pairs = [(left, right) for left, right in splits if left in ids and right in ids]
        pairs.sort(key=lambda pair: (ids[pair[0]], ids[pair[1]]))
        ranked += [(scores[index], len(left), len(right), left, right) for left, right in pairs]
    ranked.sort(key=lambda entry: entry[:3], reverse=True)
    return [(left, right) for *_, left, right in ranked]


def _bpe(
    path: Path,
    ids: dict[str, int],
    merges: list[tuple[str, str]],
    *,
    fuse_unk: bool,
    byte_fallback: bool,
    unk_token: str | None = None,
) -> models.BPE:
    try:
        return models.BPE(
            vocab=ids, merges=merges, fuse_unk=fuse_unk, byte_fallback=byte_fallback, unk_token=unk_token
        )
    except Exception as error:  # the library raises bare Exception
        raise ModelError(f"{path}: its vocabulary and merges make no BPE tokenizer: {error}") from error


def _pairs(path: Path, merges: Sequence[str]) -> list[tuple[str, str]]:
    pairs = []
    for merge in merges:
        left, separator, right = merge.partition(" ")
        if not separator or not left or not right or " " in right:
            raise ModelError(
                f"{path}: tokenizer.ggml.merges holds {merge!r}; two tokens and a blank are needed"
            )
        pairs.append((left, right))
    return pairs


def _add_tokens(tokenizer: Tokenizer, vocabulary: Vocabulary, alphabet: frozenset[str] | None) -> None:
    """Make control and user-defined tokens match whole. A control token that a byte-level vocabulary cannot
    spell is a converter's mislabel and would enlarge the vocabulary: it is left out."""
    known = tokenizer.get_vocab(with_added_tokens=False)
    special, plain = [], []
    for token, kind in zip(vocabulary.tokens, vocabulary.token_types, strict=True):
        if kind == _CONTROL and (alphabet is None or set(token) <= alphabet):
            special.append(AddedToken(token, normalized=False, special=True))
        elif kind == _USER_DEFINED and token in known:
            plain.append(AddedToken(token, normalized=False, special=False))
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(plain)


def _add_post_processor(tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    before = [vocabulary.bos_token] if vocabulary.adds_bos and vocabulary.bos_token else []
    after = [vocabulary.eos_token] if vocabulary.adds_eos and vocabulary.eos_token else []
    if not before and not after:
        return
    single = " ".join([*(f"{token}:0" for token in before), "$A:0", *(f"{token}:0" for token in after)])
    pair = " ".join([single, *(f"{token}:1" for token in before), "$B:1", *(f"{token}:1" for token in after)])
    tokens = [(token, vocabulary.tokens.index(token)) for token in [*before, *after]]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=tokens)


def _byte_spelling() -> list[str]:
    """Return the printable character that stands for each byte in byte-level vocabularies (GPT-2)."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    spelling = [""] * 256
    for octet in printable:
        spelling[octet] = chr(octet)
    for place, octet in enumerate(octet for octet in range(256) if octet not in set(printable)):
        spelling[octet] = chr(256 + place)
    return spelling
