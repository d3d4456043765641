from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from aioengine.errors import ConfigError, PromptTooLong, RequestInvalid
from aioengine.model.text.detokenizer import Detokenizer, TextStream, special_tokens
from aioengine.model.text.tokenizer import Tokenizer

SENTENCES = [
    "The quick brown fox jumps over the lazy dog, twice.",
    "Grüße aus München; 你好，世界。 今日は良い天気ですね 🙂🚀",
    "def main():\n    return {'key': 1.5}\n",
]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_level() -> tokenizers.Tokenizer:
    """Like GPT-2, Llama 3, Qwen, SmolLM: tokens are byte strings, so a character can be split."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=["<|bos|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", tokenizer.token_to_id("<|bos|>"))]
    )
    return tokenizer


def byte_fallback() -> tokenizers.Tokenizer:
    """Like Llama 2 and Mistral: word pieces with a space mark, and ``<0xE4>`` for the rest."""
    words = ["▁", "▁the", "▁fox", "the", "fox", "s", ".", "\n", "é", "世", "\ufffd", "▁▁"]
    vocab = ["<unk>", "<s>", "</s>", *[f"<0x{b:02X}>" for b in range(256)], *words]
    tokenizer = tokenizers.Tokenizer(
        models.BPE({t: i for i, t in enumerate(vocab)}, [], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


KINDS = {"byte_level": byte_level(), "byte_fallback": byte_fallback()}


@st.composite
def chunked_ids(draw: st.DrawFn) -> tuple[tokenizers.Tokenizer, list[list[int]]]:
    """Tokens of real text mixed with arbitrary tokens, cut into arbitrary chunks."""
    tokenizer = KINDS[draw(st.sampled_from(sorted(KINDS)))]
    piece = st.one_of(
        st.sampled_from(["🙂", "你好", "é", "🚀🙂 x", " the fox", "abc", "\n"]).map(
            lambda text: tokenizer.encode(text, add_special_tokens=False).ids
        ),
        st.lists(st.integers(0, tokenizer.get_vocab_size() + 3), max_size=6),
    )
    chunks = [ids for part in draw(st.lists(piece, max_size=12)) for ids in cut(draw, part)]
    return tokenizer, chunks


def cut(draw: st.DrawFn, ids: list[int]) -> list[list[int]]:
    if draw(st.booleans()):
        return [[token] for token in ids]
    middle = draw(st.integers(0, len(ids)))
    return [ids[:middle], ids[middle:]]


@settings(deadline=None, derandomize=True, max_examples=400)
@given(data=chunked_ids(), skip=st.booleans())
@pytest.mark.slow
def test_deltas_add_up_to_the_decoded_whole(
    data: tuple[tokenizers.Tokenizer, list[list[int]]], skip: bool
) -> None:
    tokenizer, chunks = data
    whole = tokenizer.decode([t for c in chunks for t in c], skip_special_tokens=skip)
    stream, text = Detokenizer(tokenizer, special_tokens(tokenizer) if skip else frozenset()), ""
    for chunk in chunks:
        text += stream.push(chunk)
        assert whole.startswith(text)
    assert text + stream.finish() == whole
    assert stream.finish() == ""


@settings(deadline=None, derandomize=True, max_examples=400)
@given(
    data=chunked_ids(),
    stop=st.lists(
        st.one_of(
            st.sampled_from(["好", "fox", " th", "e f", "🙂", "ab", "abc", "b", "bc", "\n", "�"]),
            st.text("abc ", min_size=1, max_size=4),
        ),
        max_size=3,
    ),
)
@pytest.mark.slow
def test_stop_strings_cut_at_the_earliest(
    data: tuple[tokenizers.Tokenizer, list[list[int]]], stop: list[str]
) -> None:
    tokenizer, chunks = data
    whole = tokenizer.decode([t for c in chunks for t in c])
    found = [whole.find(s) for s in stop if s in whole]
    expected = whole[: min(found)] if found else whole
    stream, text = TextStream(Detokenizer(tokenizer, special_tokens(tokenizer)), tuple(stop)), ""
    for chunk in chunks:
        delta = stream.push(chunk)
        text += delta.text
        assert expected.startswith(text)
        if delta.stop is not None:
            assert text == expected
    text += stream.finish()
    assert text == expected
    assert (stream.stopped is not None) == bool(found)
    assert stream.stopped is None or whole.startswith(stream.stopped, len(expected))


def feed(stream: TextStream, tokenizer: tokenizers.Tokenizer, text: str) -> list[Any]:
    return [stream.push([t]) for t in tokenizer.encode(text, add_special_tokens=False).ids]


def test_text_is_emitted_as_soon_as_it_is_certain() -> None:
    tokenizer = KINDS["byte_level"]
    stream = TextStream(Detokenizer(tokenizer, special_tokens(tokenizer)), ("###",))
    assert "".join(d.text for d in feed(stream, tokenizer, "abc #")) == "abc "
    assert "".join(d.text for d in feed(stream, tokenizer, "x")) == "#x"
    deltas = feed(stream, tokenizer, "y###z")
    assert "".join(d.text for d in deltas) == "y"
    assert [d.stop for d in deltas] == [None, None, None, "###", "###"]
    assert stream.finish() == ""


def test_a_long_output_decodes_in_bounded_windows() -> None:
    class Counting:
        longest = 0

        def __getattr__(self, name: str) -> Any:
            return getattr(KINDS["byte_level"], name)

        def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
            self.longest = max(self.longest, len(ids))
            return KINDS["byte_level"].decode(ids, skip_special_tokens=skip_special_tokens)

    counting = Counting()
    stream = Detokenizer(counting)  # type: ignore[arg-type]
    broken = KINDS["byte_level"].encode("🙂", add_special_tokens=False).ids[0]
    for _ in range(300):
        stream.push([broken])
    assert counting.longest < 40


def test_encode_and_decode() -> None:
    tokenizer = Tokenizer(byte_level())
    assert tokenizer.vocab_size == byte_level().get_vocab_size()
    ids = tokenizer.encode("Grüße 🙂")
    assert ids[0] == 0
    assert tokenizer.encode("Grüße 🙂", add_special_tokens=False) == ids[1:]
    assert tokenizer.decode(ids) == "Grüße 🙂"
    stream = tokenizer.text_stream(False, ())
    assert stream.push(ids).text + stream.finish() == "<|bos|>Grüße 🙂"
    for bad in ("\ud800", None, 3):
        with pytest.raises(RequestInvalid, match="valid text"):
            tokenizer.encode(bad)  # type: ignore[arg-type]


@settings(max_examples=10, deadline=None)
@given(
    texts=st.lists(st.text(max_size=20), min_size=1, max_size=140),
    special=st.booleans(),
    limit=st.none() | st.integers(5, 60),
)
def test_many_texts_are_tokenized_as_each_by_itself(
    texts: list[str], special: bool, limit: int | None
) -> None:
    tokenizer = Tokenizer(KINDS["byte_level"])
    outcomes = []
    for encode in (
        lambda: tokenizer.encode_all(texts, special, limit=limit),
        lambda: [tokenizer.encode(text, special, limit=limit) for text in texts],
    ):
        try:
            outcomes.append(encode())
        except (PromptTooLong, RequestInvalid) as error:
            outcomes.append([[type(error) is PromptTooLong]])
    assert outcomes[0] == outcomes[1]


def test_chat_adds_no_special_tokens_twice() -> None:
    tokenizer = Tokenizer(
        byte_level(), chat_template="{{ bos_token }}" + CHATML, special_tokens={"bos_token": "<|bos|>"}
    )
    messages = [{"role": "user", "content": "Hi <b>"}]
    rendered = "<|bos|><|im_start|>user\nHi <b><|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.render_chat(messages) == rendered
    assert tokenizer.encode(rendered, add_special_tokens=False).count(0) == 1


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ messages | tojson }}", '[{"role": "user", "content": "<é>"}]'),
        ("{% for m in [1, 2, 3] %}{% if m == 2 %}{% break %}{% endif %}{{ m }}{% endfor %}", "1"),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}!", "<é>!"),
        ("  {% if true %}\nx\n  {% endif %}\n", "x\n"),
        ("{{ strftime_now('%%') }}", "%"),
    ],
)
def test_templates_run_as_in_transformers(template: str, expected: str) -> None:
    tokenizer = Tokenizer(byte_level(), chat_template=template)
    assert tokenizer.render_chat([{"role": "user", "content": "<é>"}]) == expected


@pytest.mark.parametrize(
    ("template", "match"),
    [
        (None, "no chat template"),
        ("{% if %}", "does not compile"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
    ],
)
def test_unusable_templates(template: str | None, match: str) -> None:
    tokenizer = Tokenizer(byte_level(), chat_template=template)
    with pytest.raises(RequestInvalid, match=match):
        tokenizer.render_chat([{"role": "user", "content": "x"}])


@pytest.mark.parametrize(
    "messages",
    [
        [],
        "hello",
        ["hello"],
        [{"role": "user"}],
        [{"content": "x"}],
        [{"role": 1, "content": "x"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": ["x"]}],
    ],
)
def test_malformed_messages(messages: Any) -> None:
    tokenizer = Tokenizer(byte_level(), chat_template=CHATML)
    with pytest.raises(RequestInvalid, match="message"):
        tokenizer.render_chat(messages)


def write(folder: Path, **files: object) -> Path:
    saved = byte_level()
    saved.enable_truncation(4)
    saved.enable_padding(length=64)
    saved.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name.replace("__", ".")).write_text(text, encoding="utf-8")
    return folder


def test_from_dir(tmp_path: Path) -> None:
    assert Tokenizer.load(tmp_path) is None
    plain = Tokenizer.load(write(tmp_path))
    assert plain is not None
    assert len(plain.encode("The quick brown fox jumps over the lazy dog")) not in (4, 64)
    with pytest.raises(RequestInvalid, match="no chat template"):
        plain.render_chat([{"role": "user", "content": "x"}])


def test_chat_template_sources(tmp_path: Path) -> None:
    def rendered(**files: object) -> str:
        tokenizer = Tokenizer.load(write(tmp_path, **files))
        assert tokenizer is not None
        return tokenizer.render_chat([{"role": "user", "content": "x"}])

    assert rendered(tokenizer_config__json={"chat_template": "config"}) == "config"
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "{{ bos_token }}"}]
    special = {"bos_token": {"content": "<|bos|>"}, "eos_token": "<|im_end|>"}
    config = {"chat_template": named}
    assert rendered(tokenizer_config__json=config, special_tokens_map__json=special) == "<|bos|>"
    assert rendered(chat_template__jinja="{{ eos_token }}") == "<|im_end|>"


@pytest.mark.parametrize("name", ["tokenizer__json", "tokenizer_config__json"])
def test_malformed_files_are_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=name.replace("__", ".")):
        Tokenizer.load(write(tmp_path, **{name: "{oops"}))
