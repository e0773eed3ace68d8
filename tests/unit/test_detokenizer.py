import functools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers import decoders, models

from cluster.api.detokenizer import Detokenizer
from cluster.api.tokenizer import Tokenizer, UnsupportedTokenizerError
from tests.unit.api_fakes import library_tokenizer
from workers.card import load_card

LIBRARY = library_tokenizer()
TOKENIZER = Tokenizer(LIBRARY.to_str())
NUM_TOKENS = LIBRARY.get_vocab_size(with_added_tokens=True)

EMOJI_TEXTS = st.text(st.sampled_from("aé日🎉👩‍👧\u200d\ufe0f \n�\x00"), max_size=40)


def one_by_one(tokenizer: Tokenizer, token_ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.feed(token_id) for token_id in token_ids]
    return [*pieces, detokenizer.finish()]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, NUM_TOKENS - 1), max_size=40))
def test_any_tokens_add_up_to_the_full_decode(token_ids):
    # Random tokens of a byte-level vocabulary are mostly broken UTF-8: both sides must break it alike.
    assert "".join(one_by_one(TOKENIZER, token_ids)) == LIBRARY.decode(token_ids)


@settings(max_examples=200, deadline=None)
@given(EMOJI_TEXTS)
def test_text_comes_back_whole_and_no_piece_holds_half_a_character(text):
    token_ids = LIBRARY.encode(text).ids
    pieces = one_by_one(TOKENIZER, token_ids)
    assert "".join(pieces) == text
    assert pieces[-1] == ""
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_an_emoji_over_several_tokens_appears_with_its_last():
    token_ids = [LIBRARY.token_to_id(char) for char in "ðŁİī"]  # F0 9F 8E 89
    assert all(token_id is not None for token_id in token_ids)
    assert one_by_one(TOKENIZER, token_ids) == ["", "", "", "🎉", ""]


def test_a_character_cut_off_at_the_end_becomes_one_replacement_mark():
    token_ids = [LIBRARY.token_to_id(char) for char in "ðŁ"]
    assert one_by_one(TOKENIZER, token_ids) == ["", "", "\ufffd"]


def test_special_tokens_have_no_text_and_do_not_split_what_surrounds_them():
    first, *rest = (LIBRARY.token_to_id(char) for char in "ðŁİī")
    assert "".join(one_by_one(TOKENIZER, [first, 0, *rest])) == "🎉"


def test_ids_the_model_has_and_the_tokenizer_has_not_stand_for_nothing():
    assert "".join(one_by_one(TOKENIZER, [NUM_TOKENS + 5])) == ""


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 49_151), max_size=30))
def test_the_real_models_tokens_add_up_to_its_own_decode(token_ids):
    ours, library = smollm2()
    assert "".join(one_by_one(ours, token_ids)) == library.decode(token_ids)


@functools.cache
def smollm2():
    text = load_card("smollm2-135m").tokenizer_json
    return Tokenizer(text), LibraryTokenizer.from_str(text)


def sentencepiece_tokenizer() -> LibraryTokenizer:
    vocab = {"<unk>": 0, "▁": 1, "a": 2, "b": 3, "▁a": 4, "é": 5}
    vocab.update({f"<0x{byte:02X}>": 6 + byte for byte in range(256)})
    tokenizer = LibraryTokenizer(models.BPE(vocab, [("▁", "a")], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


@settings(max_examples=100, deadline=None)
@given(st.text(st.sampled_from("ab é🎉"), min_size=1, max_size=20))
def test_byte_fallback_tokens_continue_a_text_as_the_full_decode_does(text):
    library = sentencepiece_tokenizer()
    token_ids = library.encode(text.replace(" ", "▁")).ids
    generated = "".join(one_by_one(Tokenizer(library.to_str()), token_ids))
    # In the library's decode a text's very first space is dropped; generated text never is the first.
    prompt = [2]
    assert generated == library.decode(prompt + token_ids).removeprefix(library.decode(prompt))


def test_a_decoder_whose_tokens_have_no_bytes_of_their_own_is_refused_by_name():
    spec = json.loads(LIBRARY.to_str())
    spec["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    with pytest.raises(UnsupportedTokenizerError, match="WordPiece"):
        Tokenizer(json.dumps(spec))


@given(st.text(max_size=200))
def test_the_lower_bound_of_the_token_count_is_one(text):
    assert TOKENIZER.min_token_count(text) <= len(TOKENIZER.encode(text, add_special_tokens=False))
