"""Stop strings against a search one character at a time; stop tokens and lengths."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright.runtime import SamplingParams
from tilewright.runtime.stopping import StopChecker, StopStrings

letters = st.text("ab", max_size=12)


def by_character(text, stops):
    """The oracle: the text before the stop string that is complete first."""
    for end in range(1, len(text) + 1):
        done = [stop for stop in stops if text[:end].endswith(stop)]
        if done:
            return text[: end - max(map(len, done))], True
    return text, False


@settings(max_examples=300)
@given(
    pieces=st.lists(letters, max_size=8),
    stops=st.lists(st.text("ab", min_size=1, max_size=5), max_size=3),
)
def test_the_cut_does_not_depend_on_the_pieces(pieces, stops):
    strings, out, found = StopStrings(tuple(stops)), "", False
    for piece in pieces:
        text, found = strings.push(piece)
        out += text
        if found:
            break
    else:
        out += strings.finish()
    assert (out, found) == by_character("".join(pieces), stops)


@settings(max_examples=200)
@given(pieces=st.lists(letters, max_size=8), stop=st.text("ab", min_size=1, max_size=5))
def test_no_more_is_held_back_than_might_begin_a_stop(pieces, stop):
    strings, out, seen = StopStrings((stop,)), "", ""
    for piece in pieces:
        text, found = strings.push(piece)
        if found:
            return
        seen, out = seen + piece, out + text
        held = seen[len(out) :]
        assert stop.startswith(held) and held != stop
        assert not any(stop.startswith(seen[i:]) for i in range(len(out)))


class Decoder:
    """Token ids are indices of pieces; the last one stays unfinished."""

    def __init__(self, pieces, rest=""):
        self.pieces, self.rest = pieces, rest

    def push(self, token_id):
        return self.pieces[token_id]

    def finish(self):
        return self.rest


def run(pieces, *, rest="", stop_ids=(), max_tokens=100, ids=None, **params):
    checker = StopChecker(
        SamplingParams(**params), frozenset(stop_ids), max_tokens, Decoder(pieces, rest)
    )
    text, reason, count = "", None, 0
    for token in ids if ids is not None else range(len(pieces)):
        more, reason = checker.push(token)
        text, count = text + more, count + 1
        if reason:
            break
    return text, reason, count


@pytest.mark.quick
@pytest.mark.parametrize(
    ("pieces", "stop", "expected"),
    [
        (["Hello", " wor", "ld", "!"], "world", ("Hello ", "stop", 3)),  # over two tokens
        (["a", "b\n\nc", "d"], "\n\n", ("ab", "stop", 2)),  # in the middle of one token
        (["stop"], "stop", ("", "stop", 1)),
        (["x", "st", "o", "st", "op"], "stop", ("xsto", "stop", 5)),  # a false start
        (["abc", "bc"], ["abcd", "bc"], ("a", "stop", 1)),  # complete first wins
    ],
)
def test_stop_strings(pieces, stop, expected):
    assert run(pieces, stop=stop) == expected


def test_held_text_comes_out_at_the_end():
    assert run(["ab", "st"], stop="stop", max_tokens=2) == ("abst", "length", 2)
    assert run(["ab", "st", "<eos>"], stop="stop", stop_ids=[2]) == ("abst", "stop", 3)
    assert run(["ab"], rest="\ufffd", max_tokens=1) == ("ab\ufffd", "length", 1)
    assert run(["ab"], rest="cd", stop="bc", max_tokens=1)[0] == "a"


def test_nothing_stops_before_the_minimum():
    assert run(["a", "b", "c"], stop_ids=[0], ids=[0, 1, 0, 2], min_new_tokens=3)[2] == 3
    assert run(["a.", "b.", "c.", "d"], stop=".", min_new_tokens=3) == ("a.b.c", "stop", 3)
    assert run(["x", "a", "b", "c"], stop="ab", min_new_tokens=4) == ("xabc", None, 4)
    assert run(["x", "a", "b", "c"], stop="ab", min_new_tokens=3) == ("x", "stop", 3)


def test_length_is_exact_and_a_stop_at_the_limit_is_a_stop():
    assert run(["a", "b", "c"], max_tokens=2) == ("ab", "length", 2)
    assert run(["a", "b", "c"], max_tokens=2, stop_ids=[1]) == ("a", "stop", 2)


def test_without_a_decoder_there_is_no_text():
    checker = StopChecker(SamplingParams(), frozenset([5]), 3, None)
    assert [checker.push(t) for t in (1, 5)] == [("", None), ("", "stop")]
