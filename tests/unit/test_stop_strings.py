import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.api.stop_strings import StopStrings

LETTERS = st.text("abc", min_size=1, max_size=4)


def cut_text(text: str, stops: list[str]) -> tuple[str, bool]:
    """The plain definition: grow the text by one character until some stop string is its end; cut it off."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - max(map(len, ending))], True
    return text, False


@settings(max_examples=500)
@given(st.lists(LETTERS, max_size=12), st.lists(LETTERS, max_size=4))
def test_streamed_text_is_the_text_cut_at_the_first_stop_string_however_it_is_chunked(chunks, stops):
    expected, stopped = cut_text("".join(chunks), stops)
    scanner = StopStrings(stops)
    shown = ""
    for chunk in chunks:
        shown += scanner.feed(chunk)
        assert expected.startswith(shown), "nothing is shown that is later cut"
        if scanner.stopped:
            break
    if not scanner.stopped:
        shown += scanner.finish()
    assert (shown, scanner.stopped) == (expected, stopped)


def test_only_what_may_become_a_stop_string_is_held_back():
    scanner = StopStrings(["END"])
    assert scanner.feed("the E") == "the "
    assert scanner.feed("N") == ""
    assert scanner.feed("J") == "ENJ"
    assert scanner.feed("oy") == "oy"


def test_without_stop_strings_everything_is_shown_at_once():
    scanner = StopStrings([])
    assert scanner.feed("abc") == "abc"
    assert scanner.finish() == ""


@pytest.mark.parametrize("stops", [["ab", "xabyz"], ["xabyz", "ab"]])
def test_the_stop_string_complete_first_wins_over_one_that_began_earlier(stops):
    scanner = StopStrings(stops)
    assert scanner.feed("xab") == "x"
    assert scanner.stopped
