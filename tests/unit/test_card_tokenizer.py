"""Tokenizers built from GGUF metadata cut text as transformers' own GGUF conversion does."""

import json
from importlib.util import find_spec
from itertools import islice, pairwise
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tests.unit.model_files import TEXTS, GGUFModel, Q
from workers.card import load_card
from workers.models.config import ModelError

EDGES = [
    "",
    " ",
    "   ",
    "\n\n\t \r\n",
    "a\u0300 e\u0301 \u00e9 \ufb01 \u212b",
    "👩‍👩‍👧‍👦 🇺🇸 👍🏽 \u200d\ufe0f",
    "مرحبا بالعالم שלום",
    "日本語のテキスト。中文,한국어",
    "ＦＵＬＬ　ＷＩＤＴＨ １２３",  # noqa: RUF001
    "½ Ⅷ ² ٣ 𝟘 3.14e-10 0x1F",  # noqa: RUF001
    "\x00\x01\x7f\u0085\u2028\ufeff",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>",
    "<|im_start|><|im_start|> <|im_end |>",
    "it's I'M we'Ve 'tis ''' don’t",  # noqa: RUF001
    "def f(x):\n    return x ** 2  # square\n",
    "𐍈𝕳𝖊 \U0010ffff",
    "x" * 5000,
    "word " * 2000,
]


@pytest.fixture(scope="module")
def oracle() -> PreTrainedTokenizerBase:
    source = load_card("smollm2-135m").source
    return AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)


@pytest.fixture(scope="module")
def ours() -> Tokenizer:
    return Tokenizer.from_str(load_card("smollm2-135m").tokenizer_json)


def has_blank_before_number(text: str) -> bool:
    return any(left.isspace() and right.isnumeric() for left, right in pairwise(text))


def chat_texts(count: int) -> list[str]:
    spec = find_spec("chitchat_dataset")
    assert spec is not None and spec.submodule_search_locations
    path = Path(spec.submodule_search_locations[0]) / "dataset.json"
    conversations = json.loads(path.read_text()).values()
    texts = (
        message["text"]
        for conversation in conversations
        for turn in conversation["messages"]
        for message in turn
    )
    return list(islice(dict.fromkeys(texts), count))


def test_chats_and_unicode_edge_cases_are_cut_as_by_the_oracle(
    oracle: PreTrainedTokenizerBase, ours: Tokenizer
) -> None:
    texts = chat_texts(8000) + EDGES
    theirs = oracle(texts)["input_ids"]
    different = [
        text
        for text, encoding, expected in zip(texts, ours.encode_batch(texts), theirs, strict=True)
        if encoding.ids != expected
    ]
    # transformers' GGUF reader does not know the pre-tokenizer 'smollm' and leaves out its Digits step, which
    # parts blanks from the number after them. With that step put back it agrees on these texts as well.
    assert all(has_blank_before_number(text) for text in different)
    assert len(different) <= 3
    repaired = Tokenizer.from_str(oracle.backend_tokenizer.to_str())
    repaired.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\p{N}"), "isolated"), oracle.backend_tokenizer.pre_tokenizer]
    )
    for text in texts:
        assert ours.encode(text).ids == repaired.encode(text).ids, text
    assert len(texts) - len(different) >= 5000


def test_tokens_decode_to_the_text_they_came_from(oracle: PreTrainedTokenizerBase, ours: Tokenizer) -> None:
    for text in chat_texts(300) + EDGES:
        token_ids = ours.encode(text).ids
        assert ours.decode(token_ids, skip_special_tokens=False) == text
        assert ours.decode(token_ids) == oracle.decode(
            token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


def test_what_chat_templates_are_given_equals_the_oracles(oracle: PreTrainedTokenizerBase) -> None:
    card = load_card("smollm2-135m")
    assert card.chat_template == oracle.chat_template
    assert dict(card.special_tokens) == oracle.special_tokens_map
    assert (card.bos_token_id, card.eos_token_id) == (oracle.bos_token_id, oracle.eos_token_id)
    assert card.end_token_ids == (oracle.eos_token_id,)


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "qwen2", "tekken"])
@pytest.mark.parametrize("adds_bos", [False, True])
def test_other_byte_level_vocabularies_cut_as_by_transformers(
    pre: str, adds_bos: bool, tmp_path: Path
) -> None:
    model = GGUFModel(tmp_path / "m.gguf", "llama", [Q.Q8_0])
    model.num_layers = 1
    path = model.write(pre=pre, extra=lambda writer: writer.add_add_bos_token(adds_bos))
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    tokenizer = Tokenizer.from_str(load_card(str(path)).tokenizer_json)
    # transformers adds a token <|endoftext|> beyond the vocabulary here
    for text in [*TEXTS, *EDGES, "</s>", "12345 1,234", "A\r\nB", "can'T"]:
        if "<|endoftext|>" in text:
            continue
        assert tokenizer.encode(text).ids == theirs(text)["input_ids"], text
        plain = tokenizer.encode(text, add_special_tokens=False).ids
        assert plain == theirs(text, add_special_tokens=False)["input_ids"]


def sentencepiece_tokens() -> tuple[list[str], list[float], list[int]]:
    special = ["<unk>", "<s>", "</s>"]
    octets = [f"<0x{octet:02X}>" for octet in range(256)]
    letters = [*"▁abcdefghijklmnopqrstuvwxyz.,!'0123456789"]
    pieces = ["▁t", "he", "▁the", "in", "▁w", "as", "▁was", "it", "▁it", "es", "▁b", "▁be", "st", "▁▁", "er"]
    tokens = special + octets + letters + pieces
    scores = [0.0] * (len(special) + len(octets)) + [-1000.0 - i for i in range(len(letters))]
    scores += [-float(i) for i in range(len(pieces))]
    types = [2, 3, 3] + [6] * len(octets) + [1] * (len(letters) + len(pieces))
    return tokens, scores, types


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_vocabularies_cut_as_by_transformers(prefix: bool, tmp_path: Path) -> None:
    tokens, scores, types = sentencepiece_tokens()

    def write_tokens(writer) -> None:
        writer.add_tokenizer_model("llama")
        writer.add_token_list(tokens)
        writer.add_token_scores(scores)
        writer.add_token_types(types)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)
        writer.add_add_bos_token(True)
        writer.add_add_space_prefix(prefix)

    model = GGUFModel(tmp_path / "m.gguf", "llama", [Q.F32])
    model.vocab, model.num_layers = len(tokens), 1
    path = model.write(tokens=write_tokens)
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    card = load_card(str(path))
    tokenizer = Tokenizer.from_str(card.tokenizer_json)
    assert (card.bos_token_id, card.end_token_ids) == (1, (2,))
    for text in ["it was the best of times", "the  best", "water", "naïve 日本", "<s>the</s> it", ""]:
        if prefix:  # transformers' builder drops the flag and always prepends
            assert tokenizer.encode(text).ids == theirs(text)["input_ids"], text
        token_ids = tokenizer.encode(text, add_special_tokens=False).ids
        if "<s>" not in text:
            assert tokenizer.decode(token_ids) == text
    assert tokenizer.encode("the", add_special_tokens=False).tokens == (["▁the"] if prefix else ["t", "he"])


def test_unknown_kinds_of_tokenizer_are_refused_with_those_allowed(tmp_path: Path) -> None:
    model = GGUFModel(tmp_path / "m.gguf", "llama", [Q.F32])
    with pytest.raises(ModelError, match=r"tokenizer\.ggml\.pre is 'martian'; supported: .*llama-bpe"):
        load_card(str(model.write(pre="martian")))

    def write_tokens(writer) -> None:
        writer.add_tokenizer_model("bert")
        writer.add_token_list(["a"])

    with pytest.raises(ModelError, match=r"tokenizer\.ggml\.model is 'bert'; 'gpt2'"):
        load_card(str(model.write(tokens=write_tokens)))


def test_malformed_vocabularies_are_named(tmp_path: Path) -> None:
    model = GGUFModel(tmp_path / "m.gguf", "llama", [Q.F32])

    def write_tokens(types: list[int], merges: list[str], bos: int):
        def write(writer) -> None:
            writer.add_tokenizer_model("gpt2")
            writer.add_tokenizer_pre("gpt-2")
            writer.add_token_list(["a", "b", "ab"])
            writer.add_token_types(types)
            writer.add_token_merges(merges)
            writer.add_bos_token_id(bos)

        return write

    cases = [
        (([1, 1], ["a b"], 0), r"token_type has 2 entries for 3 tokens"),
        (([1, 1, 1], ["ab"], 0), r"merges holds 'ab'; two tokens and a blank"),
        (([1, 1, 1], ["a c"], 0), r"its vocabulary and merges make no BPE tokenizer"),
        (([1, 1, 1], ["a b"], 3), r"bos_token_id is 3; the vocabulary has 3 tokens"),
    ]
    for arguments, message in cases:
        with pytest.raises(ModelError, match=message):
            load_card(str(model.write(tokens=write_tokens(*arguments))))
