"""Text as it streams in: what is out is what the tokenizer itself makes of all tokens so far."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as Backend

from tilewright.formats.tokenizer import Tokenizer, TokenizerConfig

SPACE, BROKEN = "\u2581", "\ufffd"
# e4 bd a0 is one character, ef bf bd is U+FFFD; the last two are no bytes of the alphabet, or none.
BYTES = ["a", "b2", "Ġ", "Ġa", "ĠĠ", "ä", "½", "ł", "ä½", "½ł", "ä½ł"]
BYTES += ["aä", "ła", "ï¿½", "ï", "日"] + [""]
WORDS = [SPACE, SPACE * 2, SPACE + "a", "a", "b" + SPACE + "c", "##d", BROKEN, "</w>", "."]
WORDS += ["<0xE4>", "<0xBD>", "<0xA0>", "<0x41>", "<0x20>", ""]
FUSED = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
DECODERS = {
    "bytes": decoders.ByteLevel(),
    "fused": decoders.Sequence(FUSED),
    "stripped": decoders.Sequence([*FUSED, decoders.Strip(" ", 1, 0)]),
    "metaspace": decoders.Metaspace(),
    # These are none whose tokens add up.
    "stripped at both ends": decoders.Sequence([*FUSED, decoders.Strip(" ", 1, 1)]),
    "two stripped": decoders.Sequence([*FUSED, decoders.Strip(" ", 2, 0)]),
    "pieces of words": decoders.WordPiece(),
    "ends of words": decoders.BPEDecoder("</w>"),
    "none": None,
}
ADD_UP = ("bytes", "fused", "stripped", "metaspace")


def tokenizer_of(kind: str) -> Tokenizer:
    words = BYTES if kind == "bytes" else WORDS
    backend = Backend(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="a"))
    if DECODERS[kind] is not None:
        backend.decoder = DECODERS[kind]
    backend.add_special_tokens(["<s>"])
    backend.add_tokens([AddedToken("tool call", normalized=False)])
    return Tokenizer(backend, TokenizerConfig())


TOKENIZERS = {kind: tokenizer_of(kind) for kind in DECODERS}


def certain(tokenizer: Tokenizer, ids: list[int], skip: bool) -> list[str]:
    """After each token all the text that is certain, from the definition: what `decode` makes of
    the tokens so far, unless it ends within a character, or may, as behind a token of a byte.
    """
    found = [""]
    for count, token in enumerate(ids, 1):
        text = tokenizer.decode(ids[:count], skip)
        spelled = tokenizer.backend.id_to_token(token)
        none = spelled is None or (skip and spelled == "<s>")
        open_ = none or spelled.startswith("<0x") or text.endswith(BROKEN)
        found.append(found[-1] if open_ else text)
    return found[1:]


@pytest.mark.quick
@pytest.mark.parametrize("kind", ADD_UP)
@given(data=st.data(), skip=st.booleans())
def test_what_is_out_is_what_the_tokenizer_decodes(kind: str, data: st.DataObject, skip: bool):
    tokenizer = TOKENIZERS[kind]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size), max_size=12))  # and one too many
    stream, out, so_far = tokenizer.stream(skip), "", []
    for token in ids:
        out += stream.push(token)
        so_far.append(out)
    assert so_far == certain(tokenizer, ids, skip)
    assert out + stream.finish() == tokenizer.decode(ids, skip)


@pytest.mark.quick
def test_most_tokens_are_looked_up_but_none_whose_neighbours_count():
    for kind, tokenizer in TOKENIZERS.items():
        stream = tokenizer.stream()
        pieces = {
            tokenizer.backend.id_to_token(token): stream._pieces[token]
            for token in range(tokenizer.vocab_size)
        }
        known = {word: piece for word, piece in pieces.items() if piece}
        assert pieces["<s>"] == "" and (kind in ADD_UP or not known)
        if kind == "bytes":
            words = ["a", "b2", "\u0120", "\u0120a", "\u0120\u0120", "\u00e4\u00bd\u0142", "\u65e5"]
            assert [*known] == [*words, "tool call"]
            assert known["\u00e4\u00bd\u0142"] == "\u4f60" and known["\u0120"] == " "
        elif kind in ADD_UP:
            assert not any(word.startswith("<0x") or word == BROKEN for word in known)
            assert known[SPACE * 2] == "  " and known["b" + SPACE + "c"] == "b c"


@pytest.mark.quick
def test_the_table_is_shared_and_its_tokens_are_not_decoded_again(monkeypatch: pytest.MonkeyPatch):
    tokenizer = tokenizer_of("stripped")
    ids = [2, 3, 4, 0, 3] * 4  # the first one loses its space
    for _ in range(2):
        stream = tokenizer.stream()
        assert "".join(map(stream.push, ids)) + stream.finish() == tokenizer.decode(ids)
    decoded: list[list[int]] = []
    pieces = stream._pieces
    decode = type(pieces).decode
    monkeypatch.setattr(
        type(pieces), "decode", lambda self, ids: decoded.append(ids) or decode(self, ids)
    )
    third = tokenizer.stream()
    assert "".join(map(third.push, ids)) == tokenizer.decode(ids)
    assert third._pieces is pieces and decoded == [[2]]
