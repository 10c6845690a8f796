"""Tokenizers: ids as transformers gives them, streams that add up, templates in the sandbox."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import gguf
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, trainers

from tilewright.errors import CheckpointError, UsageError
from tilewright.formats.gguf import GGUFCheckpoint
from tilewright.formats.gguf_tokenizer import read_gguf_tokenizer
from tilewright.formats.hf_tokenizer import read_hf_tokenizer
from tilewright.formats.tokenizer import Tokenizer, TokenizerConfig
from tiny_gguf import SPECIALS, TEXT, finish, tiny_bpe, write_tiny_gguf

TEXTS = [
    "Hello world",
    "",
    " leading and trailing ",
    "a  b\n\n\tc",
    "The year 1984, 12.5%",
    "don't we'LL",
    "h\u00e9llo \u4f60\u597d \U0001f642\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "combining e\u0301",
    "<|im_start|>user\nhi<|im_end|>\n",
    "\x00\x1f\u00a0\u2028\ufffd",
    "def f(x):\n    return x ** 2\n",
]
CHATS = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "<b>\u00e9</b>"}],
]


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf: Path) -> Tokenizer:
    return read_gguf_tokenizer(GGUFCheckpoint(smollm2_gguf))


@pytest.fixture(scope="module")
def oracle(smollm2_gguf: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name)


def test_smollm2_matches_transformers(smollm2: Tokenizer, oracle):
    for text in TEXTS:
        assert smollm2.encode(text) == oracle.encode(text), text
        ids = oracle.encode(text)
        assert smollm2.decode(ids, skip_special_tokens=False) == text
        assert smollm2.decode(ids) == oracle.decode(ids, skip_special_tokens=True)
    for messages in CHATS:
        for prompt in (True, False):
            expected = oracle.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=prompt
            )
            assert smollm2.apply_chat_template(messages, prompt) == expected
    assert smollm2.eos_token_ids == (oracle.eos_token_id,) == (2,)
    assert smollm2.bos_token_id == oracle.bos_token_id
    assert smollm2.vocab_size == len(oracle)


def test_smollm2_splits_digits_before_spaces(smollm2: Tokenizer):
    """SmolLM cuts digits off first, so a run of spaces before a number stays one token."""
    two_spaces = smollm2.encode("  ")
    assert len(two_spaces) == 1
    assert smollm2.encode("  12") == [*two_spaces, *smollm2.encode("1"), *smollm2.encode("2")]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tok") / "m.gguf"
    write_tiny_gguf(path)
    return read_gguf_tokenizer(GGUFCheckpoint(path))


@pytest.mark.quick
@given(text=st.text() | st.sampled_from(TEXTS + [TEXT]))
def test_byte_level_round_trip_through_gguf(tiny: Tokenizer, text: str):
    ids = tiny.encode(text)
    assert ids == _reference().encode(text).ids
    assert tiny.decode(ids, skip_special_tokens=False) == text


def _reference() -> Backend:
    if not _REFERENCE:
        _REFERENCE.append(tiny_bpe())
    return _REFERENCE[0]


_REFERENCE: list[Backend] = []


def sentencepiece(prefix: bool = True) -> Backend:
    """A SentencePiece-like BPE with byte fallback, as the tokenizers library would hold it."""
    backend = Backend(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    steps = [normalizers.Prepend("\u2581")] if prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "\u2581")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=specials, max_token_length=8, show_progress=False
    )
    backend.train_from_iterator([word + " " for word in TEXT.split()], trainer)
    # bytes are plain vocabulary; the trainer made added tokens of them
    data = json.loads(backend.to_str())
    data["added_tokens"] = [token for token in data["added_tokens"] if token["id"] < 3]
    return Backend.from_str(json.dumps(data))


def write_spm(path: Path, backend: Backend, prefix: bool = True, **fields: bool) -> None:
    data = json.loads(backend.to_str())["model"]
    vocab = sorted(data["vocab"], key=data["vocab"].__getitem__)
    rank = {"".join(pair): i for i, pair in reversed(list(enumerate(data["merges"])))}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(vocab)
    writer.add_token_scores([-float(rank.get(token, 1e6)) for token in vocab])
    kinds = {"<unk>": 2, "<s>": 3, "</s>": 3}
    writer.add_token_types([kinds.get(t, 6 if t.startswith("<0x") else 1) for t in vocab])
    for name, token in (("bos", 1), ("eos", 2), ("unknown", 0)):
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", token)
    writer.add_bool("tokenizer.ggml.add_space_prefix", prefix)
    for name, flag in fields.items():
        writer.add_bool(f"tokenizer.ggml.{name}", flag)
    finish(writer)


@pytest.mark.quick
@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_merges_are_recovered(prefix: bool, tmp_path: Path):
    source = sentencepiece(prefix)
    write_spm(tmp_path / "m.gguf", source, prefix)
    tokenizer = read_gguf_tokenizer(GGUFCheckpoint(tmp_path / "m.gguf"))
    for text in [TEXT, *TEXTS, "the foxes jumped quickly overland"]:
        expected = source.encode(text).ids
        assert tokenizer.encode(text, add_special_tokens=False) == expected
        assert tokenizer.encode(text) == [1, *expected]
        assert tokenizer.decode(expected) == source.decode(expected)
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.quick
def test_bos_and_eos_follow_the_file(tmp_path: Path):
    source = sentencepiece()
    write_spm(tmp_path / "m.gguf", source, add_bos_token=False, add_eos_token=True)
    tokenizer = read_gguf_tokenizer(GGUFCheckpoint(tmp_path / "m.gguf"))
    assert tokenizer.encode("fox") == [*source.encode("fox").ids, 2]


def streamed(tokenizer: Tokenizer, ids: Sequence[int], skip: bool) -> list[str]:
    stream = tokenizer.stream(skip)
    return [*(stream.push(token) for token in ids), stream.finish()]


@pytest.mark.quick
@given(data=st.data(), skip=st.booleans())
def test_stream_adds_up_to_decode(tiny: Tokenizer, data: st.DataObject, skip: bool):
    """Random tokens: broken UTF-8, special tokens and all."""
    spm = Tokenizer(_spm(), TokenizerConfig())
    for tokenizer in (tiny, spm):
        token = st.integers(0, tokenizer.vocab_size - 1)
        text = st.text(max_size=8).map(lambda t, to=tokenizer: to.encode(t, False))
        ids = sum(data.draw(st.lists(text | st.lists(token, max_size=6), max_size=4)), [])
        parts = streamed(tokenizer, ids, skip)
        assert "".join(parts) == tokenizer.decode(ids, skip)


_SPM: list[Backend] = []


def _spm() -> Backend:
    if not _SPM:
        _SPM.append(sentencepiece())
    return _SPM[0]


@pytest.mark.quick
def test_stream_emits_no_half_characters(tiny: Tokenizer):
    text = "\u4f60\u597d, fox \U0001f642!"
    parts = streamed(tiny, tiny.encode(text), True)
    assert "".join(parts) == text
    assert not any("\ufffd" in part for part in parts)
    assert sum(bool(part) for part in parts) > 5


@pytest.mark.quick
def test_save_and_load(tiny: Tokenizer, tmp_path: Path):
    tiny.save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    loaded = Tokenizer.load(tmp_path)
    assert loaded.config == tiny.config
    assert loaded.encode(TEXT) == tiny.encode(TEXT)


@pytest.mark.quick
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", [None, "", "{}", "[1]", '{"bos_token_id": 1'])
def test_damaged_folder(name: str, text: str | None, tiny: Tokenizer, tmp_path: Path):
    tiny.save(tmp_path)
    (tmp_path / name).unlink() if text is None else (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError, match=name):
        Tokenizer.load(tmp_path)


def test_hf_folder(smollm2_gguf: Path, oracle, smollm2: Tokenizer, tmp_path: Path):
    assert read_hf_tokenizer(tmp_path) is None
    oracle.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 0]}')
    tokenizer = read_hf_tokenizer(tmp_path)
    for text in TEXTS:
        assert tokenizer.encode(text) == oracle.encode(text)
    assert tokenizer.eos_token_ids == (2, 0)
    assert tokenizer.apply_chat_template(CHATS[0]) == smollm2.apply_chat_template(CHATS[0])
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="tokenizer files"):
        read_hf_tokenizer(tmp_path)


def with_template(tiny: Tokenizer, template: str) -> Tokenizer:
    special = (("bos_token", "<s>"),)
    return Tokenizer(tiny.backend, TokenizerConfig((2,), 1, template, special))


@pytest.mark.quick
def test_template_helpers(tiny: Tokenizer):
    template = (
        "{{ bos_token }}{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}"
        "{% generation %}{{ m | tojson }}{% endgeneration %}{% endfor %}"
        "{{ strftime_now('%Y') }}{{ tools is none }}{{ extra }}"
    )
    text = with_template(tiny, template).apply_chat_template(
        [{"b": "<\u00e9>", "a": 1}, {}, {"never": 1}], tools=None, extra=3
    )
    assert text == f'<s>{{"b": "<\u00e9>", "a": 1}}{{}}{datetime.now():%Y}True3'


@pytest.mark.quick
@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('only users') }}",
        "{% for %}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{% include '/etc/passwd' %}",
        "{{ 1 / 0 }}",
        "{{ messages[0]['x'] + 1 }}",
        "{{ range(999999999) | list }}",
    ],
)
def test_template_that_fails_or_breaks_out(template: str, tiny: Tokenizer):
    with pytest.raises(UsageError, match="chat template"):
        with_template(tiny, template).apply_chat_template(CHATS[0])


@pytest.mark.quick
def test_wrong_use(tiny: Tokenizer):
    with pytest.raises(UsageError, match="without one"):
        Tokenizer(tiny.backend, TokenizerConfig()).apply_chat_template(CHATS[0])
    with pytest.raises(UsageError, match="plain data"):
        tiny.apply_chat_template([{"role": "user", "content": object()}])
    for text in (3, None, "\ud800"):
        with pytest.raises(UsageError, match="whole Unicode"):
            tiny.encode(text)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"model": "bert"}, "gpt2, llama, found 'bert'"),
        ({"pre": "nonsense"}, "llama-bpe.*qwen2.*found 'nonsense'"),
        ({"merges": ["a b c"]}, "merges"),
        ({"merges": ["zz yy"]}, "merges"),
        ({"bos_token_id": 10**6}, "bos_token_id"),
        ({"token_type": [1]}, "token_type"),
        ({"tokens": [1, 2]}, "tokens"),
    ],
)
def test_contradicting_fields(fields: dict, found: str, tiny: Tokenizer, tmp_path: Path):
    write_tiny_gguf(tmp_path / "m.gguf")
    checkpoint = GGUFCheckpoint(tmp_path / "m.gguf")
    checkpoint._metadata = {
        **checkpoint.metadata,
        **{f"tokenizer.ggml.{key}": value for key, value in fields.items()},
    }
    with pytest.raises(CheckpointError, match=found):
        read_gguf_tokenizer(checkpoint)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("gpt-2", "it's 1234  x", ["it", "'s", " 1234", " ", " x"]),
        ("smollm", "it's 1234", ["it", "'s", " ", "1", "2", "3", "4"]),
        ("llama-bpe", "IT'S 1234\n\nx", ["IT", "'S", " ", "123", "4", "\n\n", "x"]),
        ("qwen2", "IT'S 12\n\nx!", ["IT", "'S", " ", "1", "2", "\n\n", "x", "!"]),
    ],
)
def test_pre_tokenizers(pre: str, text: str, pieces: list[str]):
    from tilewright.formats.gguf_tokenizer import _pre_tokenizer

    cut = _pre_tokenizer(pre).pre_tokenize_str(text)
    assert [text[start:stop] for _, (start, stop) in cut] == pieces


def test_specials_stay_whole(tiny: Tokenizer):
    assert tiny.encode("".join(SPECIALS)) == [0, 1, 2]
